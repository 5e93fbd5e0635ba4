"""Files: model directories, training checkpoints, tensor files, and pickles that are read without running them."""
