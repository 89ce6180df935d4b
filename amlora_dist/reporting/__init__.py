"""Reports: what a run or a comparison gave, as one self-contained page."""
