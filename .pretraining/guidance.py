import sys, random, torch, collections
torch.set_num_threads(2); torch.set_grad_enabled(False)
from minialign.pipeline import Pipeline
from minialign.prompts import SHAPES, parse, spread
from minialign.shapes import annotator, world
seen, held = world.prompts(21)
sp=lambda texts,n: spread(texts,[parse(t,SHAPES).category for t in texts],n,random.Random(1))
texts=sp(seen,120)+sp(held,120)
def measure(pipe,tag,steps,g):
    ims=[]
    for k in range(0,240,60): ims+=pipe.generate(texts[k:k+60],steps=steps,guidance=g,seed=5000+k)
    sc=[annotator.read(i) for i in ims]; empt=sum(annotator.segment(i) is None for i in ims)
    by=collections.defaultdict(list)
    for t,s in zip(texts,sc): by[parse(t,SHAPES).category].append(s is not None and s.shows(parse(t,SHAPES)))
    print(tag,steps,g,"readable %.3f unclean %.3f aligned %.3f"%(sum(s is not None for s in sc)/240,empt/240,sum(sum(v) for v in by.values())/240),{k:"%.2f"%(sum(v)/len(v)) for k,v in by.items()},flush=True)
if __name__=="__main__":
    for m in sys.argv[1:]:
        pipe=Pipeline.from_pretrained(None if m=="base" else m)
        for g in (1.5,2.0,2.5,3.0): measure(pipe,m[-16:],10,g)
        measure(pipe,m[-16:],20,2.0); measure(pipe,m[-16:],20,3.0)
