"""One thin module per stage, run by hand or by `ray job submit`; README.md lists them."""
