"""CUDA graphs: many small kernels, started all at once."""
from collections.abc import Callable

import torch


class Recorded:
    """A function as a CUDA graph: called the first time, recorded the second, then replayed.

    The first call sets up what must not be recorded, such as cuDNN's choice of kernels. Graphs may
    share `memory`, of torch.cuda.graph_pool_handle, where they never run at the same time and leave
    nothing in it for one another.
    """

    def __init__(self, memory: tuple | None = None):
        self.memory = memory
        self.graph = None
        self.was_called = False

    def __call__(self, function: Callable[[], None]) -> None:
        """The function must be the same every time and work on tensors that stay where they are.

        What it allocates belongs to the graph, whose next replay overwrites it.
        """
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
