"""The laboratory: recipes, models, baselines and data to try normalizations on; needs `kalmannorm[lab]`."""
