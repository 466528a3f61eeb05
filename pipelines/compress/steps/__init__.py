"""The steps, each a stage: a model folder in, a model folder and a record out."""
