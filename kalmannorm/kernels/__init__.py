"""Hand-written forward and backward passes. Each computes what an expression of torch functions computes, with which
its tests compare it. Nothing here depends on modules or on recorded steps.
"""
