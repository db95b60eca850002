"""What a figure of matplotlib shows, as data: the models are `charts.py` of the package e2b_code_interpreter."""

import datetime
import re

# A unit in an axis label: "Time (s)", "Mass [kg]".
UNIT = re.compile(r"\s\((.*?)\)|\[(.*?)\]")


def is_figure(obj):
    """Whether it is one, without importing anything."""
    return any(c.__module__ == "matplotlib.figure" and c.__name__ == "Figure" for c in type(obj).__mro__)


def watch_box_plots():
    """Keeps with its axes what a box plot was drawn from: of lines and patches it is guesswork."""
    from matplotlib.axes import Axes

    draw = Axes.bxp

    def bxp(self, bxpstats, positions=None, *args, **kwargs):
        before = set(map(id, self._children))
        made = draw(self, bxpstats, positions, *args, **kwargs)
        names = ("vert", "orientation")
        vertical = kwargs.get("vert") is not False and kwargs.get("orientation") != "horizontal"
        if args and not any(n in kwargs for n in names) and len(args) > 1 and args[1] is False:
            vertical = False
        at = positions if positions is not None else range(1, len(bxpstats) + 1)
        boxes = self.__dict__.setdefault("_interpreter_boxes", [])
        boxes += [(dict(stats), float(x), vertical) for stats, x in zip(bxpstats, at)]
        drawn = self.__dict__.setdefault("_interpreter_box_artists", [])
        drawn += [artist for artist in self._children if id(artist) not in before]
        return made

    Axes.bxp = bxp


def of_figure(figure, plain):
    """The chart, or none for a figure without data. `plain` makes a value one of JSON's."""
    axes = [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]
    if not any(ax.has_data() for ax in axes):
        return None
    if len(axes) == 1:
        return of_axes(axes[0], plain)
    title = figure._suptitle.get_text() if figure._suptitle else None
    return {"type": "superchart", "title": title or None, "elements": [of_axes(ax, plain) for ax in axes]}


def of_axes(ax, plain):
    """The chart of one pair of axes."""
    from matplotlib.collections import PathCollection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle, Wedge
    from matplotlib.text import Text

    chart = {"type": "unknown", "title": ax.get_title() or None, "elements": []}
    boxes = getattr(ax, "_interpreter_boxes", None)
    of_boxes = {id(a) for a in getattr(ax, "_interpreter_box_artists", ())}
    # Annotations, and lines that only mark a value (axhline), are beside the data.
    shown = [
        a
        for a in ax._children
        if not isinstance(a, Text)
        and id(a) not in of_boxes
        and not (isinstance(a, Line2D) and a.get_transform() != ax.transData)
    ]
    bars = {id(patch) for container in bar_containers(ax) for patch in container.patches}
    whiskers = {id(part) for container in bar_containers(ax) for part in errors_of(container)}
    shown = [a for a in shown if id(a) not in whiskers]

    if boxes and not shown:
        return box_chart(ax, chart, boxes, plain)
    if shown and all(isinstance(a, Line2D) for a in shown):
        return line_chart(ax, chart, shown, plain)
    if shown and all(isinstance(a, PathCollection) for a in shown):
        return scatter_chart(ax, chart, shown, plain)
    if shown and all(isinstance(a, Wedge) for a in shown):
        chart["type"] = "pie"
        for wedge in shown:
            angle = round(abs(float(wedge.theta2) - float(wedge.theta1)), 4)
            chart["elements"].append({"label": label_of(wedge, ""), "angle": angle, "radius": float(wedge.r)})
        return chart
    if shown and all(isinstance(a, Rectangle) and id(a) in bars for a in shown):
        return bar_chart(ax, chart, plain)
    return chart


def bar_containers(ax):
    from matplotlib.container import BarContainer

    return [c for c in ax.containers if isinstance(c, BarContainer)]


def errors_of(container):
    if container.errorbar is None:
        return []
    line, caps, lines = container.errorbar.lines
    return [part for part in (line, *caps, *lines) if part is not None]


def label_of(artist, default):
    """The label that somebody gave it. Those with an underscore are matplotlib's."""
    label = str(artist.get_label() or "")
    return default if label.startswith("_") or not label else label


def unit(label):
    found = UNIT.search(label or "")
    return (found.group(1) or found.group(2)) if found else None


def axis_labels(ax, swapped=False):
    """`swapped` if the axis of the categories is y."""
    x, y = ax.get_xlabel() or None, ax.get_ylabel() or None
    if swapped:
        x, y = y, x
    return {"x_label": x, "y_label": y, "x_unit": unit(x), "y_unit": unit(y)}


def converter(axis):
    get = getattr(axis, "get_converter", None)
    return get() if get else axis.converter


def scale(axis, ticks, labels, name):
    kind = type(converter(axis)).__name__
    if "Date" in kind:
        return "datetime"
    if name != "linear":
        return name
    if kind == "StrCategoryConverter":
        return "categorical"
    # Ticks 0, 1, 2 ... under names of their own.
    numbered = len(ticks) > 0 and all(tick == n and label != str(n) for n, (tick, label) in enumerate(zip(ticks, labels)))
    named = type(axis.get_major_formatter()).__name__ in ("FixedFormatter", "FuncFormatter", "StrCategoryFormatter")
    return "categorical" if numbered and named else name


def ticks_of(axis, name, plain):
    from matplotlib.dates import num2date

    at = axis.get_majorticklocs()
    labels = [label.get_text() for label in axis.get_majorticklabels()]
    numbers = [plain(x) for x in at]
    kind = scale(axis, numbers, labels, name)
    if kind == "datetime":
        numbers = [num2date(x).isoformat() for x in at]
    else:
        numbers = [float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else x for x in numbers]
    return numbers, labels, kind


def planar(ax, chart, plain):
    chart.update(axis_labels(ax))
    for letter, axis, name in (("x", ax.xaxis, ax.get_xscale()), ("y", ax.yaxis, ax.get_yscale())):
        ticks, labels, kind = ticks_of(axis, name, plain)
        chart |= {f"{letter}_ticks": ticks, f"{letter}_tick_labels": labels, f"{letter}_scale": kind}
    return chart


def point(value, plain):
    """Dates come out as ISO 8601."""
    if type(value).__name__ == "datetime64":
        value = value.astype("datetime64[us]").item()
    if isinstance(value, (datetime.date, datetime.datetime)):
        return value.isoformat()
    return plain(value)


def points(xs, ys, plain):
    return [[point(x, plain), point(y, plain)] for x, y in zip(xs, ys)]


def line_chart(ax, chart, lines, plain):
    chart["type"] = "line"
    planar(ax, chart, plain)
    for n, line in enumerate(lines):
        data = points(line.get_xdata(), line.get_ydata(), plain)
        chart["elements"].append({"label": label_of(line, f"Line {n}"), "points": data})
    return chart


def scatter_chart(ax, chart, collections, plain):
    chart["type"] = "scatter"
    planar(ax, chart, plain)
    for n, collection in enumerate(collections):
        xs, ys = collection.get_offsets().T
        data = points(given(ax.xaxis, chart["x_scale"], xs), given(ax.yaxis, chart["y_scale"], ys), plain)
        chart["elements"].append({"label": label_of(collection, f"Scatter {n}"), "points": data})
    return chart


def given(axis, kind, values):
    """What was plotted, of what it was turned into."""
    from matplotlib.dates import num2date

    if kind == "datetime":
        return [num2date(v) for v in values]
    names = getattr(axis.units, "_mapping", None)
    if kind == "categorical" and names:
        back = {number: name for name, number in names.items()}
        return [back.get(int(v), v) if float(v).is_integer() else v for v in values]
    return values


def bar_chart(ax, chart, plain):
    containers = bar_containers(ax)
    swapped = all(c.orientation == "horizontal" for c in containers)
    chart["type"] = "bar"
    chart.update(axis_labels(ax, swapped))
    axis = ax.yaxis if swapped else ax.xaxis
    ticks, labels, kind = ticks_of(axis, "linear", plain)
    for n, container in enumerate(containers):
        group = label_of(container, f"Group {n}")
        for rect in container.patches:
            start, size, value = (
                (rect.get_y(), rect.get_height(), rect.get_width())
                if swapped
                else (rect.get_x(), rect.get_width(), rect.get_height())
            )
            name = nearest(start, size, ticks, labels, kind)
            chart["elements"].append({"label": name, "group": group, "value": plain(value)})
    return chart


def nearest(start, size, ticks, labels, kind):
    """The name under a bar, or where the bar stands. Bars of a group stand beside their tick."""
    from matplotlib.dates import date2num

    middle = float(start + size / 2)
    if kind == "datetime":
        ticks = [date2num(datetime.datetime.fromisoformat(t)) for t in ticks]
    near = min(zip(ticks, labels), key=lambda t: abs(t[0] - middle), default=None)
    reach = 0.5 if kind == "categorical" else abs(float(size)) / 2
    if near is not None and near[1] and abs(near[0] - middle) <= reach + 1e-9:
        return near[1]
    return f"{middle:g}"


def box_chart(ax, chart, boxes, plain):
    swapped = not any(vertical for _, _, vertical in boxes)
    chart["type"] = "box_and_whisker"
    chart.update(axis_labels(ax, swapped))
    ticks, labels, _ = ticks_of(ax.yaxis if swapped else ax.xaxis, "linear", plain)
    for stats, at, _ in boxes:
        under = [label for tick, label in zip(ticks, labels) if tick == at and label]
        chart["elements"].append(
            {
                "label": (under or [str(stats.get("label") or f"{at:g}")])[0],
                "min": plain(stats["whislo"]),
                "first_quartile": plain(stats["q1"]),
                "median": plain(stats["med"]),
                "third_quartile": plain(stats["q3"]),
                "max": plain(stats["whishi"]),
                "outliers": [plain(x) for x in stats.get("fliers", ())],
            }
        )
    return chart
