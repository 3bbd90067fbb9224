"""Rewrites for exports, into operators that engines other than PyTorch have."""
