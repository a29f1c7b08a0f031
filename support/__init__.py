"""What a first reading can leave out: details that keep promises, a file each.

- damage: JPEG and noise in training, where a recipe asks for it;
- figures: what a run's files tell, for its page;
- files: files that are there whole or not at all;
- flags: the command line of train.py, stored and read again;
- history: an epoch's line, a run's table;
- launches: the operations of a training step, counted on a GPU that is only imagined;
- meter: sums of an epoch, and the progress bar;
- model_files: whatever somebody's model file may hold, tried out;
- needed: what to install where a package is missing;
- process: signals and streams around a command line;
- provenance: which code made a run;
- settings: settings.json read, and what going on with a run refuses;
- teachers: another network's answers beside the labels;
- workers: the well-known loader, image by image in processes.
"""
