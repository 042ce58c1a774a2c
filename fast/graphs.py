"""CUDA graphs: many small kernels, started all at once."""
import torch


class Recorded:
    """A function as a CUDA graph: called as it is the first time, recorded the second time, from then on replayed.

    The first call sets up what must not be recorded, such as cuDNN's choice of kernels.

    Args:
        function: without arguments; works on tensors that stay where they are. What it allocates belongs to the graph,
        whose next replay overwrites it.
    """

    def __init__(self, function):
        self.function, self.graph, self.was_called = function, None, False

    def __call__(self):
        if not self.was_called:
            self.was_called = True
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # Other threads, which copy the next batches, may run meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.function()
        self.graph.replay()
