// Numbers of a run as curves: [xs, ys], the gaps left out.

export function curve(run, axis, metric, factor) {
  const rows = run.rows.filter((row) => row[axis] !== null && row[metric] !== null);
  return [rows.map((row) => row[axis]), rows.map((row) => row[metric] * factor)];
}

// The mean of each value and up to `reach` on either side of it, as many on both.
export function smoothed(values, reach) {
  const sums = [0];
  for (const value of values) sums.push(sums[sums.length - 1] + value);
  return values.map((_, i) => {
    const near = Math.min(reach, i, values.length - 1 - i);
    return (sums[i + near + 1] - sums[i - near]) / (2 * near + 1);
  });
}

// How far a curve is above another one, where that has values on both sides.
export function above([xs, ys], [baseXs, baseYs]) {
  const found = [[], []];
  let right = 0;
  xs.forEach((x, i) => {
    while (right < baseXs.length && baseXs[right] < x) right += 1;
    if (right === baseXs.length || (right === 0 && baseXs[0] !== x)) return;
    const left = Math.max(right - 1, 0);
    const part = right === left ? 0 : (x - baseXs[left]) / (baseXs[right] - baseXs[left]);
    found[0].push(x);
    found[1].push(ys[i] - baseYs[left] - part * (baseYs[right] - baseYs[left]));
  });
  return found;
}

export function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "";
  const size = Math.abs(value);
  for (const [unit, base] of [["E", 1e18], ["P", 1e15], ["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]]) {
    if (size >= base) return +(value / (unit === "k" ? 1e3 : base)).toPrecision(4) + unit;
  }
  return size !== 0 && size < 1e-3 ? (+value.toPrecision(3)).toExponential() : String(+value.toPrecision(5));
}

export function download(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
