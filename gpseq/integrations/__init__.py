"""Doors into other libraries: each module here needs the library that it is named after, and only that.

``import gpseq.integrations`` needs none of them.
"""
