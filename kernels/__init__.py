"""Operations that deserve a file of their own: an equation, its definition in PyTorch, and room for a fast twin.

Model code calls the op and never asks how it is computed.
"""
