"""An interpreter of PTX in numpy: it runs what Triton and nvcc compile for sm_80 and sm_90, with every access checked, and needs no GPU.

Read parser.py, machine.py and then the units. Names in comments are those of sections in NVIDIA's manual
"PTX ISA", whose numbers move from version to version.
"""
