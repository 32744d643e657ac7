"""Where the time and memory of a training step go, against the bare networks: ``python -m kd_hf.bench RECIPE``.

What is timed is the trainer's own optimiser step (its feed, its prepared module, its optimiser) on one batch that
stays on the device, at random weights. Marks at the borders of its parts cut it into

=========  ======================================================================================================
hand-over  images normalised, erased and mixed, the methods' random numbers, learning rate and weights of losses
teacher    forward passes of the teachers that are read
student    forward pass
losses     forward passes of the task's loss and the methods, with their own modules
backward   sum of the losses, backward pass of student and methods, exchange of gradients
optimiser  clipping of gradients, step, gradients set to None, moving average
=========  ======================================================================================================

so the parts of a round add up to its step; with ``train.torch_compile`` the losses count as the student's. In turns
with it and on the same tensors runs the *bare pair*: the teachers' networks alone in inference mode, then forward,
cross-entropy and backward of the student's network alone. The *tax* is the step without the optimiser's part over the
bare pair, as a median over rounds. Teachers run also where the recipe reads their stored outputs.

Reading, decoding and augmenting a batch is timed by itself, in one process: during training workers do it meanwhile.
On a GPU the trainer works one batch ahead on a second stream; the step is then timed that way, several in a row
between two events, and its parts in a second run where everything stands in one queue.
"""
