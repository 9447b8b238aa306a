/* The frontier as an interactive chart (Chart.js); without a script the drawings and tables stay. */
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const holder = document.getElementById("frontier");
  if (!holder || typeof Chart === "undefined") return;
  const networks = JSON.parse(document.getElementById("frontier-data").textContent);
  const select = document.getElementById("frontier-network");
  const defense = document.getElementById("frontier-defense");
  const dominated = document.getElementById("frontier-dominated");
  const intervals = document.getElementById("frontier-intervals");
  const markers = ["circle", "triangle", "rect", "rectRot", "star", "crossRot"];
  for (const name of Object.keys(networks)) select.add(new Option(name, name));
  const names = Object.values(networks).flatMap((rows) => rows.map((row) => row.name));
  for (const name of new Set(names)) defense.add(new Option(name, name));

  const datasets = () =>
    networks[select.value]
      .map((row, number) => {
        // Told apart by marker and name as well, never by colour alone.
        const colour = `hsl(${(number * 137.5) % 360} 65% 50%)`;
        const points = row.points.filter((point) => dominated.checked || !point.dominated);
        return {
          label: row.name,
          data: points,
          borderColor: colour,
          backgroundColor: points.map((point) => (point.dominated ? "transparent" : colour)),
          pointBackgroundColor: points.map((point) => (point.dominated ? "transparent" : colour)),
          pointStyle: markers[number % markers.length],
          pointRadius: 6,
          pointHoverRadius: 9,
          showLine: points.length > 1,
          borderWidth: 1.5,
          clip: 12, // markers on the edge stay whole
        };
      })
      .filter((set) => !defense.value || set.label === defense.value);

  const bars = {
    id: "intervals",
    beforeDatasetsDraw(chart) {
      if (!intervals.checked) return;
      const { ctx, scales, chartArea } = chart;
      const line = (x0, y0, x1, y1) => {
        ctx.beginPath();
        ctx.moveTo(x0, y0);
        ctx.lineTo(x1, y1);
        ctx.stroke();
      };
      ctx.save();
      ctx.rect(chartArea.left, chartArea.top, chartArea.width, chartArea.height);
      ctx.clip();
      ctx.lineWidth = 1;
      chart.data.datasets.forEach((set, index) => {
        if (!chart.isDatasetVisible(index)) return;
        ctx.strokeStyle = set.borderColor;
        for (const point of set.data) {
          const x = scales.x.getPixelForValue(point.x);
          const y = scales.y.getPixelForValue(point.y);
          if (point.ys) line(x, scales.y.getPixelForValue(point.ys[0]), x, scales.y.getPixelForValue(point.ys[1]));
          if (point.xs) line(scales.x.getPixelForValue(point.xs[0]), y, scales.x.getPixelForValue(point.xs[1]), y);
        }
      });
      ctx.restore();
    },
  };

  holder.hidden = false;
  document.body.classList.add("has-frontier");
  const ink = () => getComputedStyle(document.body).color;
  Chart.defaults.animation = false;
  Chart.defaults.color = ink();
  const chart = new Chart(document.getElementById("frontier-chart"), {
    type: "scatter",
    data: { datasets: datasets() },
    plugins: [bars],
    options: {
      maintainAspectRatio: false,
      scales: {
        x: { title: { display: true, text: "accuracy lost, points" } },
        y: { title: { display: true, text: "images recovered, %" }, min: 0, max: 100 },
      },
      plugins: {
        legend: { position: "bottom", labels: { usePointStyle: true } },
        tooltip: { callbacks: { label: (item) => item.raw.words } },
      },
    },
  });
  const redraw = () => {
    chart.data.datasets = datasets();
    chart.update();
  };
  for (const control of [select, defense, dominated, intervals]) control.addEventListener("change", redraw);
  document.getElementById("theme").addEventListener("click", () => {
    chart.options.color = Chart.defaults.color = ink();
    chart.update();
  });
});
