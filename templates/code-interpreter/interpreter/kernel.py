"""The Python kernel: IPython's own, with representations for programs beside those for people."""

import builtins
import json
import math
import os
import random
import sys

import zmq
from ipykernel.ipkernel import IPythonKernel
from ipykernel.kernelapp import IPKernelApp
from IPython.core.formatters import BaseFormatter, JSONFormatter
from traitlets import ObjectName, Unicode

from . import charts

INLINE = "module://matplotlib_inline.backend_inline"
# Values, at most, of a frame that is sent whole beside its table.
MAX_CELLS = 200_000
# Bytes, at most, of a list or dictionary that is sent as JSON beside its text.
MAX_JSON = 1 << 20


class Kernel(IPythonKernel):
    """Takes from a request's metadata what holds for it alone: see `execute_request`."""

    async def execute_request(self, stream, ident, parent):
        """`metadata.interpreter`: `env` {name: value} for good, `once` {name: value} for this execution,
        `fresh` if the machine is another one than before, `rehearsal` if no trace of it is to stay."""
        extra = parent.get("metadata", {}).get("interpreter") or {}
        history = History(self.shell) if extra.get("rehearsal") else None
        os.environ.update(extra.get("env") or {})
        if extra.get("fresh"):
            reseed()
        once = extra.get("once") or {}
        before = {name: os.environ.get(name) for name in once}
        os.environ.update(once)
        try:
            await super().execute_request(stream, ident, parent)
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if history:
                history.restore()


class History:
    """What a cell leaves behind beside what it does."""

    def __init__(self, shell):
        self.shell, self.count = shell, shell.execution_count
        numpy = sys.modules.get("numpy")
        self.inputs = len(shell.history_manager.input_hist_parsed)
        owners = (
            (shell.displayhook, ("_", "__", "___")),
            (shell.history_manager, ("_i00", "_i", "_ii", "_iii")),
        )
        self.fields = [(owner, name, getattr(owner, name, "")) for owner, names in owners for name in names]
        self.names = ("_", "__", "___", "_i", "_ii", "_iii", f"_{self.count}", f"_i{self.count}")
        self.seeds = random.getstate(), numpy and numpy.random.get_state()
        self.values = {name: shell.user_ns[name] for name in self.names if name in shell.user_ns}

    def restore(self):
        """As if there had been no cell since."""
        shell = self.shell
        for owner, name, value in self.fields:
            setattr(owner, name, value)
        for name in self.names:
            shell.user_ns.pop(name, None)
        shell.user_ns.update(self.values)
        shell.user_ns.get("_oh", {}).pop(self.count, None)
        del shell.history_manager.input_hist_parsed[self.inputs :]
        del shell.history_manager.input_hist_raw[self.inputs :]
        shell.execution_count = self.count
        random.setstate(self.seeds[0])
        if self.seeds[1]:
            sys.modules["numpy"].random.set_state(self.seeds[1])


class App(IPKernelApp):
    """With a queue of output that drops nothing."""

    kernel_class = Kernel

    def init_iopub(self, context):
        context.setsockopt(zmq.SNDHWM, 0)
        super().init_iopub(context)

    def log_connection_info(self):
        """How others connect: nobody does."""

    def init_crash_handler(self):
        """What goes wrong is in the log of the server."""


def reseed():
    """All machines of one snapshot would draw the same numbers."""
    random.seed()
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()


def plain(value):
    """A value as JSON knows it: numbers of numpy, times as ISO 8601, and no NaN."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


class DataFormatter(BaseFormatter):
    """Frames of pandas by column."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = (dict, str)

    def __call__(self, obj):
        pandas = sys.modules.get("pandas")
        if not isinstance(obj, getattr(pandas, "DataFrame", ())):
            return super().__call__(obj)
        if obj.size > MAX_CELLS:
            return None
        # By position: names may be there twice, and need not be text.
        columns = {}
        for at, name in enumerate(obj.columns):
            key, number = str(name), 2
            while key in columns:
                key, number = f"{name}.{number}", number + 1
            columns[key] = [None if value is pandas.NaT else plain(value) for value in obj.iloc[:, at]]
        return columns


class ChartFormatter(BaseFormatter):
    """What the figures of matplotlib show."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = (dict, str)

    def __call__(self, obj):
        if not charts.is_figure(obj):
            return super().__call__(obj)
        try:
            return charts.of_figure(obj, plain)
        except Exception as e:
            # The picture is there all the same.
            print(f"no data of this chart: {type(e).__name__}: {e}", file=sys.__stderr__)
            return None


class ValueFormatter(JSONFormatter):
    """Lists and dictionaries as what they are."""

    def __call__(self, obj):
        if isinstance(obj, (list, dict)):
            try:
                text = json.dumps(obj, default=array, allow_nan=False)
            except (TypeError, ValueError, RecursionError):
                return None
            return None if len(text) > MAX_JSON else (json.loads(text), {"expanded": True})
        return super().__call__(obj)


def array(value):
    """Arrays and numbers of numpy."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(type(value).__name__)


def show_pictures(display):
    """`image.show()` has no screen here, and a picture that is saved is one that somebody wants to see."""
    from PIL import Image, ImageShow

    class Viewer(ImageShow.Viewer):
        def show(self, image, **_):
            display(image)
            return 1

    ImageShow.register(Viewer(), 0)
    save = Image.Image.save

    def shown(image, fp, format=None, **options):
        save(image, fp, format, **options)
        if isinstance(fp, (str, os.PathLike)):
            display(image)

    Image.Image.save = shown


def run(connection):
    """Serves the connection file's sockets until it is told to end."""
    # Where the kernel is, and not where its program was started.
    sys.path[0] = ""
    os.environ.pop("PYTHONPATH", None)
    os.environ["MPLBACKEND"] = INLINE
    app = App.instance()
    app.connection_file = connection
    app.config.InteractiveShell.colors = "NoColor"
    # Each machine would write a database that nobody reads.
    app.config.HistoryManager.enabled = False
    app.initialize([])
    shell = app.shell
    formatters = shell.display_formatter.formatters
    for formatter in (DataFormatter, ChartFormatter, ValueFormatter):
        made = formatter(parent=shell.display_formatter)
        formatters[made.format_type] = made
    # What was imported before there was a shell is told of it now.
    from IPython.core.pylabtools import activate_matplotlib
    from IPython.display import display
    from matplotlib_inline.backend_inline import configure_inline_support

    activate_matplotlib(INLINE)
    configure_inline_support(shell, INLINE)
    charts.watch_box_plots()
    show_pictures(display)
    builtins.display = display
    app.start()


if __name__ == "__main__":
    run(sys.argv[1])
