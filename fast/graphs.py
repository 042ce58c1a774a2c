"""CUDA graphs: many small kernels, started all at once."""
import torch


class Recorded:
    """A function as a CUDA graph: called as it is the first time, recorded the second time, from then on replayed.

    The first call sets up what must not be recorded, such as cuDNN's choice of kernels.

    Args:
        memory: of torch.cuda.graph_pool_handle, for graphs that share it as they never run at the same time and leave
        nothing in it for one another; None for its own.
    """

    def __init__(self, memory=None):
        self.memory, self.graph, self.was_called = memory, None, False

    def __call__(self, function):
        """Args: function: the same every time, without arguments; works on tensors that stay where they are. What it
        allocates belongs to the graph, whose next replay overwrites it."""
        if not self.was_called:
            self.was_called = True
            function()
            return
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            # Other threads, which copy the next batches, may run meanwhile.
            with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
                function()
            self.graph = graph
        self.graph.replay()
