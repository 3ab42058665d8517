"""Networks as files: sparse, coded, Caffe's, and those of other tools."""
