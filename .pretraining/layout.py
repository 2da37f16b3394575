# ruff: noqa
"""Where readability is lost: drawings noised to t, sampled from there without guidance: layout.py [WORK FOLDER]"""
import sys
from pathlib import Path
import torch
from measure import assemble, calibrate
from minialign.pipeline import Pipeline
from minialign.shapes import world, annotator
from minialign.prompts import SHAPES, parse
torch.set_num_threads(2); torch.set_grad_enabled(False)
if len(sys.argv) > 1:
    calibrate(pipe := assemble(Path(sys.argv[1]))[0])
else:
    pipe = Pipeline.from_pretrained(annotator.STATISTICS.parent)
pairs = world.pretraining_pairs(200, 21, clean=True)
z = pipe.encode_images([i for _, i in pairs])[0]; texts=[t for t,_ in pairs]
ab=pipe.schedule.alphas_cumprod
g=torch.Generator().manual_seed(0); e0=torch.randn(z.shape,generator=g)
print("drawings themselves", sum(annotator.read(i) is not None for _,i in pairs)/200)
for tau in (999,900,800,700,600,500,400,300,200):
    ts=[round(tau*(20-k)/20) for k in range(20)]
    x=ab[tau].sqrt()*z+(1-ab[tau]).sqrt()*e0; ims=[]
    for k in range(0,200,50):
        y=x[k:k+50]; c=pipe.encode_prompts(texts[k:k+50],(64,64))
        for j,t in enumerate(ts):
            a=ab[t]; v=pipe.unet(y,torch.full((len(y),),t),*c); x0=a.sqrt()*y-(1-a).sqrt()*v; e=a.sqrt()*v+(1-a).sqrt()*y
            n=ab[ts[j+1]] if j<19 else torch.tensor(1.); y=n.sqrt()*x0+(1-n).sqrt()*e
        ims+=pipe.decode(y)
    print(tau,"SNR %.3f"%(ab[tau]/(1-ab[tau])),"readable",sum(annotator.read(i) is not None for i in ims)/200,flush=True)
