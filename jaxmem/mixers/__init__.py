"""Sequence mixers, one family per file; `jaxmem.mixers.base` states their contract.

A mixer is found by its file standing here: every module of this folder is imported when the
registry is first asked, so adding one needs no edit anywhere else.
"""
