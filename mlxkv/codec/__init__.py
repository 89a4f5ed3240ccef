"""Transform coding of key/value caches after KVTC (arXiv 2511.01815): one method a file, one stage a file.

codec.py takes a cache to a container block by block; artifacts.py and calibrate.py hold and make what a method learns.

kvtc:    layers --rows--> [B*T, p] --pca--> [B*T, r] --plan, quantize, payload--> codes --deflate or rans--> container
kvtc_rd: layers --rows--> [B*T, p] --weighting, basis--> [B*T, r] --one step--> integers --entropy--> container
"""
