"""Networks with stock BatchNorm layers, which `kalmannorm.lab.methods.normalize` replaces."""
