/** Around sets of cells of a grid. */

/**
 * The borders of a set of cells as closed loops of corners [x, y], clockwise around what they
 * hold. Cells that touch at a corner alone are apart.
 * @param {number[]} cells their numbers, row by row
 * @param {(x: number, y: number) => boolean} inside whether a cell is of the set
 * @param {number} columns cells in a row
 */
export function loops(cells, inside, columns) {
  const across = columns + 1; // corners in a row
  const ways = [1, across, -1, -across]; // to the next corner: east, south, west, north
  const borders = new Set(); // 4 x the corner that a border leaves + its way
  for (const cell of cells) {
    const [x, y] = [cell % columns, Math.floor(cell / columns)];
    const corner = y * across + x;
    if (!inside(x, y - 1)) borders.add(4 * corner);
    if (!inside(x + 1, y)) borders.add(4 * (corner + 1) + 1);
    if (!inside(x, y + 1)) borders.add(4 * (corner + across + 1) + 2);
    if (!inside(x - 1, y)) borders.add(4 * (corner + across) + 3);
  }
  const found = [];
  for (const first of borders) {
    const loop = [];
    let [border, corner, last] = [first, first >> 2, -1];
    do {
      borders.delete(border);
      const way = border % 4;
      if (way !== last) loop.push([corner % across, Math.floor(corner / across)]);
      last = way;
      corner += ways[way];
      // To the right first: that stays with the cell that it goes around.
      border = [1, 0, 3].map((turn) => 4 * corner + ((way + turn) % 4)).find((b) => borders.has(b));
    } while (corner !== first >> 2);
    found.push(loop);
  }
  return found;
}
