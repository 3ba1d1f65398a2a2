"""Video object segmentation learned from one annotated frame a clip, through cycles of soft masks (arXiv 2206.00182, on 2112.09131)."""
