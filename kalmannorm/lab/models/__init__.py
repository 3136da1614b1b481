"""Networks, built with stock BatchNorm layers that a recipe replaces from outside."""
