"""Sets of arrays on disk and in object stores: what reads them item by item, and what writes them.

Knows nothing of servers and codebooks. The client's bulk jobs and the training tools stand on it.
"""
