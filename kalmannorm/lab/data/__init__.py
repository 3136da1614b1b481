"""Data sets as LightningDataModules, and the functions that load or generate them."""
