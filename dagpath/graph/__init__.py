"""The graphs of a traced model: of neurons, and unrolled of scalar activations."""

from dagpath.capture.site import Site
from dagpath.graph.neuron_graph import Cause, NeuronGraph
from dagpath.graph.unrolled import Gates, Level, UnrolledGraph

__all__ = ["Cause", "Gates", "Level", "NeuronGraph", "Site", "UnrolledGraph"]
