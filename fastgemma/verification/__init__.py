"""`fastgemma.verify` and `python -m fastgemma verify`: the user's own model and data, stock against patched.

`run` switches features and collects verdicts, `measure` runs the model once, `judge` says how far apart two results may
be, `truth` turns the model into float32 and back, `preserve` leaves everything as it was found, `report` prints, and
`load` makes a model and a batch from a directory.
"""
