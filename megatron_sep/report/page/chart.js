// One figure: curves of several runs, drawn by uPlot; a dragged span zooms all figures, a double click goes back.
import { download, short } from "./series.js";

const HEIGHT = 260;

export class Chart {
  constructor(figure, onZoom) {
    Object.assign(this, { figure, onZoom, series: [], marks: [] });
    this.element = document.createElement("figure");
    this.element.id = `figure-${figure.name}`;
    const caption = document.createElement("figcaption");
    const title = document.createElement("b");
    this.unit = document.createElement("small");
    title.append(`${figure.title} `, this.unit);
    caption.append(title, this.button("PNG", () => this.png()), this.button("CSV", () => this.csv()));
    this.place = document.createElement("div");
    this.element.append(caption, this.place);
    new ResizeObserver(() => this.plot && this.plot.setSize(this.size())).observe(this.place);
  }

  button(name, act) {
    const button = document.createElement("button");
    button.textContent = name;
    button.title = `save this figure as ${name}`;
    button.onclick = act;
    return button;
  }

  size() {
    return { width: Math.max(this.place.clientWidth, 200), height: HEIGHT };
  }

  // series: [{label, colour, dash, width, faint, curve}], faint ones without a legend; marks: [{x, colour}], view: [from, to] of x.
  draw(series, marks, axis, view) {
    Object.assign(this, { series, marks, view, axis });
    this.unit.textContent = this.figure.unit;
    this.element.hidden = series.every((each) => each.curve[0].length === 0);
    if (this.element.hidden) return;
    const data = window.uPlot.join(series.map((each) => each.curve));
    const kind = JSON.stringify([axis, series.map(({ label, colour, faint }) => [label, colour, faint])]);
    if (this.plot && this.kind === kind) {
      this.plot.setData(data);
      return;
    }
    if (this.plot) this.plot.destroy();
    this.kind = kind;
    this.plot = new window.uPlot(this.options(axis), data, this.place);
  }

  options(axis) {
    const values = (_, ticks) => ticks.map((tick) => short(tick && this.figure.log ? +tick.toPrecision(2) : tick));
    return {
      ...this.size(),
      scales: { x: { time: false, range: () => this.view }, y: { distr: this.figure.log ? 3 : 1, range: () => this.limits() } },
      axes: [
        { label: axis, labelSize: 20, size: 34, values },
        { size: 62, values },
      ],
      series: [
        { label: axis, value: (_, x) => short(x) },
        ...this.series.map((each) => ({
          label: each.label, stroke: each.colour, width: each.width, alpha: each.faint ? 0.25 : 1, dash: each.dash, spanGaps: true,
          class: each.faint ? "faint" : undefined,
          points: { show: each.curve[0].length < 40 }, value: (_, y) => short(y),
        })),
      ],
      legend: { markers: { fill: (_, i) => (this.series[i - 1].dash ? "white" : this.series[i - 1].colour) } },
      cursor: { drag: { setScale: false }, sync: { key: "runs" }, bind: { dblclick: () => () => this.onZoom(null) } },
      hooks: {
        setSelect: [(plot) => this.selected(plot)],
        draw: [(plot) => this.drawMarks(plot)],
      },
    };
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 5) return;
    this.onZoom([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  }

  // Of what is in view; of a figure that settles, without the steep first tenth of the run where the view allows it.
  limits() {
    const [from, to] = this.view;
    const last = Math.max(...this.series.flatMap((each) => each.curve[0].slice(-1)));
    const settled = this.figure.settles && to > last / 5 ? Math.max(from, last / 10) : from;
    let [low, high] = [Infinity, -Infinity];
    for (const { curve: [xs, ys] } of this.series) {
      xs.forEach((x, i) => {
        if (x < settled || x > to || !Number.isFinite(ys[i]) || (this.figure.log && ys[i] <= 0)) return;
        low = Math.min(low, ys[i]);
        high = Math.max(high, ys[i]);
      });
    }
    if (low > high) return [this.figure.log ? 0.1 : 0, 1];
    if (this.figure.log) return [low / 1.1, high * 1.1];
    const apart = high - low > 1e-6 * Math.abs(high);
    const room = (apart ? high - low : Math.abs(high) || 1) * 0.06;
    return [low - room, high + room];
  }

  drawMarks(plot) {
    const { ctx, bbox } = plot;
    ctx.save();
    for (const { x, colour } of this.marks) {
      if (x < this.view[0] || x > this.view[1]) continue;
      const at = plot.valToPos(x, "x", true);
      ctx.strokeStyle = colour;
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  png() {
    const source = this.plot.ctx.canvas;
    const line = 20 * devicePixelRatio;
    const named = this.series.filter(({ faint }) => !faint);
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: source.width, height: source.height + line * (named.length + 2) });
    const ctx = canvas.getContext("2d");
    ctx.fillStyle = "white";
    ctx.fillRect(0, 0, canvas.width, canvas.height);
    ctx.font = `${line * 0.65}px sans-serif`;
    ctx.fillStyle = "#1d2330";
    ctx.fillText([this.figure.title, this.figure.unit].filter(Boolean).join(", "), line, line);
    ctx.drawImage(source, 0, 1.4 * line);
    named.forEach((each, i) => {
      ctx.fillStyle = each.colour;
      ctx.fillText(`― ${each.label}`, line, source.height + line * (i + 2.2));
    });
    canvas.toBlob((blob) => download(`${this.figure.name}.png`, blob));
  }

  csv() {
    const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
    const names = this.series.map(({ label, faint }) => quoted(faint ? `${label}, each line` : label));
    const lines = this.series.flatMap(({ curve: [xs, ys] }, of) => xs.map((x, i) => `${names[of]},${x},${ys[i]}`));
    const head = `curve,${quoted(this.axis)},${quoted([this.figure.title, this.figure.unit].filter(Boolean).join(", "))}`;
    download(`${this.figure.name}.csv`, new Blob([[head, ...lines, ""].join("\n")], { type: "text/csv" }));
  }
}
