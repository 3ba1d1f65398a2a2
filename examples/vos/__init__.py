"""Video object segmentation that is learned from one annotated frame a clip, after arXiv 2206.00182 and 2112.09131."""
