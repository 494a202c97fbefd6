'use strict';

// ---- tables: a heading sorts, a field filters

function cellText(row, column) {
  return row.cells[column].textContent.trim();
}

function compare(first, second) {
  const a = parseFloat(first);
  const b = parseFloat(second);
  if (!Number.isNaN(a) && !Number.isNaN(b)) return a - b;
  return first.localeCompare(second, undefined, {numeric: true});
}

function sortBy(heading) {
  const table = heading.closest('table');
  const column = heading.cellIndex;
  const rows = [...table.tBodies[0].rows];
  // Numbers are looked at from the largest down, names from A to Z; a second press turns it round.
  const isNumeric = rows.some((row) => !Number.isNaN(parseFloat(cellText(row, column))));
  const first = isNumeric ? 'descending' : 'ascending';
  const second = isNumeric ? 'ascending' : 'descending';
  const order = heading.getAttribute('aria-sort') === first ? second : first;
  for (const other of heading.parentNode.cells) other.setAttribute('aria-sort', 'none');
  heading.setAttribute('aria-sort', order);
  const sign = order === 'ascending' ? 1 : -1;
  const isAbsent = (text) => text === '' || text === '–';
  rows.sort((a, b) => {
    const [x, y] = [cellText(a, column), cellText(b, column)];
    // Cells without a value come last, in either order.
    if (isAbsent(x) !== isAbsent(y)) return isAbsent(x) ? 1 : -1;
    return sign * compare(x, y);
  });
  table.tBodies[0].append(...rows);
}

for (const button of document.querySelectorAll('[data-sort]')) {
  button.addEventListener('click', () => sortBy(button.closest('th')));
}

for (const field of document.querySelectorAll('[data-filter]')) {
  const table = field.closest('label').nextElementSibling.querySelector('table');
  field.addEventListener('input', () => {
    const words = field.value.toLowerCase();
    for (const row of table.tBodies[0].rows) {
      row.hidden = !row.textContent.toLowerCase().includes(words);
    }
  });
}

// ---- curves: the values at a step, by pointer or arrow keys

function nearest(xs, x) {
  let best = 0;
  for (let i = 1; i < xs.length; i++) {
    if (Math.abs(xs[i] - x) < Math.abs(xs[best] - x)) best = i;
  }
  return best;
}

function readable(svg) {
  const {lines} = JSON.parse(svg.dataset.chart);
  const output = svg.nextElementSibling;
  // One step after another of the line with most of them.
  const main = lines.reduce((a, b) => (b.x.length > a.x.length ? b : a));
  const cursor = document.createElementNS(svg.namespaceURI, 'line');
  cursor.setAttribute('class', 'cursor');
  cursor.setAttribute('y1', 12);
  cursor.setAttribute('y2', svg.viewBox.baseVal.height - 44);
  cursor.style.display = 'none';
  svg.append(cursor);
  const dots = lines.map((line) => {
    const dot = document.createElementNS(svg.namespaceURI, 'circle');
    dot.setAttribute('r', 4);
    dot.style.fill = `var(--c${line.color})`;
    dot.style.display = 'none';
    svg.append(dot);
    return dot;
  });
  let place = main.x.length - 1;

  function show(index) {
    place = Math.max(0, Math.min(main.x.length - 1, index));
    const x = main.x[place];
    cursor.setAttribute('x1', x);
    cursor.setAttribute('x2', x);
    cursor.style.display = '';
    const parts = lines.map((line, i) => {
      const at = nearest(line.x, x);
      dots[i].setAttribute('cx', line.x[at]);
      dots[i].setAttribute('cy', line.y[at]);
      dots[i].style.display = '';
      return lines.length > 1 ? `${line.name} ${line.values[at]}` : line.values[at];
    });
    output.textContent = `step ${main.steps[place]}: ${parts.join(', ')}`;
    svg.setAttribute('aria-valuenow', main.steps[place]);
    svg.setAttribute('aria-valuetext', output.textContent);
  }

  // A slider over the steps, which is how arrow keys and screen readers know it.
  svg.setAttribute('role', 'slider');
  svg.setAttribute('tabindex', '0');
  svg.setAttribute('aria-valuemin', main.steps[0]);
  svg.setAttribute('aria-valuemax', main.steps[main.steps.length - 1]);
  svg.setAttribute('aria-valuenow', main.steps[place]);
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    show(nearest(main.x, x));
  });
  svg.addEventListener('focus', () => show(place));
  svg.addEventListener('keydown', (event) => {
    const page = Math.max(1, Math.round(main.x.length / 10));
    const targets = {
      ArrowLeft: place - 1, ArrowDown: place - 1, ArrowRight: place + 1, ArrowUp: place + 1,
      PageDown: place - page, PageUp: place + page, Home: 0, End: main.x.length - 1,
    };
    if (!(event.key in targets)) return;
    event.preventDefault();
    show(targets[event.key]);
  });
}

document.querySelectorAll('[data-chart]').forEach(readable);

// ---- pictures of confusions: the cell that is pointed at

for (const picture of document.querySelectorAll('[data-matrix]')) {
  const {names, counts} = JSON.parse(picture.dataset.matrix);
  const found = new Map();
  for (let i = 0; i < counts.length; i += 3) {
    found.set(counts[i] * names.length + counts[i + 1], counts[i + 2]);
  }
  picture.addEventListener('pointermove', (event) => {
    const box = picture.getBoundingClientRect();
    const at = (share) => Math.max(0, Math.min(names.length - 1, Math.floor(share * names.length)));
    const row = at((event.clientY - box.top) / box.height);
    const column = at((event.clientX - box.left) / box.width);
    const clips = found.get(row * names.length + column) || 'no or few';
    const words = row === column ? 'recognised' : `taken for ${names[column]}`;
    picture.nextElementSibling.textContent = `${names[row]} ${words}: ${clips} clips`;
  });
}

// ---- clips: each is stored once and played wherever it is shown

const films = JSON.parse(document.getElementById('films').textContent);
const urls = new Map();
const playing = new Map();
const sound = document.getElementById('sound');

function filmUrl(name) {
  if (!urls.has(name)) {
    const [head, content] = films[name].split(',');
    const bytes = Uint8Array.from(atob(content), (character) => character.charCodeAt(0));
    const type = head.slice('data:'.length).split(';')[0];
    urls.set(name, URL.createObjectURL(new Blob([bytes], {type})));
  }
  return urls.get(name);
}

function stop(button) {
  const player = playing.get(button);
  if (!player) return;
  playing.delete(button);
  player.pause();
  player.remove();
  button.setAttribute('aria-pressed', 'false');
}

function stopAll() {
  [...playing.keys()].forEach(stop);
  for (const row of document.querySelectorAll('[data-row]')) row.setAttribute('aria-pressed', 'false');
}

function play(button, name, isSilent) {
  const isHeardOnly = 'sound' in button.dataset || films[name].startsWith('data:audio');
  const player = document.createElement(isHeardOnly ? 'audio' : 'video');
  player.src = filmUrl(name);
  player.loop = true;
  player.playsInline = true;
  // Asked for by itself, the sound of a query is heard in any case.
  player.muted = isSilent || (sound && !sound.checked && !('sound' in button.dataset));
  if (!isHeardOnly) button.append(player);
  playing.set(button, player);
  button.setAttribute('aria-pressed', 'true');
  // Refused where it is stopped before it has begun, or where a browser forbids it.
  player.play().catch(() => stop(button));
}

for (const button of document.querySelectorAll('[data-clip], [data-sound]')) {
  button.addEventListener('click', () => {
    const wasPlaying = playing.has(button);
    stopAll();
    if (!wasPlaying) play(button, button.dataset.clip || button.dataset.sound, false);
  });
}

for (const button of document.querySelectorAll('[data-row]')) {
  button.addEventListener('click', () => {
    const wasPlaying = button.getAttribute('aria-pressed') === 'true';
    stopAll();
    if (wasPlaying) return;
    button.setAttribute('aria-pressed', 'true');
    for (const clip of button.closest('.query').querySelectorAll('[data-clip]')) {
      play(clip, clip.dataset.clip, true);
    }
  });
}

if (sound) {
  sound.addEventListener('change', () => {
    for (const [button, player] of playing) {
      if (!('sound' in button.dataset)) player.muted = !sound.checked;
    }
  });
}

document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') stopAll();
});
