"""Callbacks for the training loops of other packages. Each module needs the package that it is for; see its extra."""
