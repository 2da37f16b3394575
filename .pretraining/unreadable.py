import sys, json
from pathlib import Path
from PIL import Image
from minialign.shapes import annotator
import collections
for side in sys.argv[2:]:
    ps=sorted(Path(side).glob("images/*.png"))
    bad=[]; why=collections.Counter()
    for p in ps:
        im=Image.open(p).convert("RGB")
        if annotator.read(im) is None:
            f=annotator.segment(im)
            if f is None: w="unclean"
            else:
                sh={annotator._shape(r.numbers) for r in f[1]}
                w="noshape" if None in sh else "several" if len(sh)>1 else "many"
            why[w]+=1; bad.append(im)
    print(side,len(ps),len(bad),why)
    n=min(len(bad),60); cols=12
    sheet=Image.new("RGB",(cols*98,((n+cols-1)//cols)*98),"white")
    for i,im in enumerate(bad[:n]): sheet.paste(im.resize((96,96),Image.LANCZOS),((i%cols)*98,(i//cols)*98))
    sheet.save(f"{sys.argv[1]}-{Path(side).name[:8]}.png")
