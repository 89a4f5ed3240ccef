"""The KVTC transform codec (arXiv 2511.01815), one stage a file, each stage beside its inverse.

layers [B, H, T, D] --rows--> [B*T, p] --project--> [B*T, r] --quantize--> codes --pack, deflate--> container
"""
