// Which words two texts share, by their longest common subsequence.

const CELLS = 4_000_000; // of the table: two texts of 2,000 words; beyond it only the common ends are found

/** The text in words, single marks and runs of blank space; together they are the text. */
function words(text) {
  return text.match(/\s+|[\p{L}\p{N}\p{M}'’]+|[^\s\p{L}\p{N}\p{M}]/gu) ?? [];
}

const blank = (word) => !word.trim();

const ALIKE = 0.4; // the share of words in common below which marks between two texts are only noise

/**
 * {before, after}: each a list of [piece, changed]. What is not changed is, but for blank space, the same in both.
 * `common` is the share of the words of both that are not changed; 1 where there are none.
 */
function difference(before, after) {
  const [left, right] = [words(before), words(after)];
  const kept = shared(left.filter((word) => !blank(word)), right.filter((word) => !blank(word)));
  const all = [...kept.a, ...kept.b];
  const common = all.length ? all.filter(Boolean).length / all.length : 1;
  return { before: pieces(left, kept.a), after: pieces(right, kept.b), common };
}

/** {a, b}: for each word whether it belongs to the longest common subsequence; common ends need no table. */
function shared(a, b) {
  const kept = { a: new Array(a.length).fill(true), b: new Array(b.length).fill(true) };
  const head = agreeing(a, b, (list, i) => list[i]);
  const tail = agreeing(a.slice(head), b.slice(head), (list, i) => list[list.length - 1 - i]);
  const [m, n] = [a.length - tail, b.length - tail];
  kept.a.fill(false, head, m);
  kept.b.fill(false, head, n);
  for (const [i, j] of matches(a.slice(head, m), b.slice(head, n))) kept.a[head + i] = kept.b[head + j] = true;
  return kept;
}

/** How many items the two lists agree on from one end, counted by `item(list, i)`. */
function agreeing(a, b, item) {
  const most = Math.min(a.length, b.length);
  let length = 0;
  while (length < most && item(a, length) === item(b, length)) length += 1;
  return length;
}

/** [i, j] of the words of a longest common subsequence; none where the table would be too large. */
function matches(a, b) {
  if (a.length * b.length > CELLS) return [];
  const [table, width, found] = [lengths(a, b), b.length + 1, []];
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) found.push([i++, j++]);
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
    else j += 1;
  }
  const beside = (match, at) => follows(found[at - 1], match) || follows(match, found[at + 1]);
  return found.filter((match, at) => a[match[0]].length > 3 || beside(match, at));
}

/** Whether the two matches are neighbours. A short word that matches alone is chance: it goes. */
function follows(one, next) {
  return Boolean(one && next) && one[0] + 1 === next[0] && one[1] + 1 === next[1];
}

/** (len(a) + 1) x (len(b) + 1): how long a longest common subsequence of a from i on and b from j on is. */
function lengths(a, b) {
  const width = b.length + 1;
  const table = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      table[at] = a[i] === b[j] ? table[at + width + 1] + 1 : Math.max(table[at + width], table[at + 1]);
    }
  }
  return table;
}

/** The words joined to [piece, changed]; blank space is changed where it lies between two changed words. */
function pieces(list, kept) {
  const changed = [];
  let at = 0;
  for (const word of list) changed.push(blank(word) ? null : !kept[at++]);
  const joined = [];
  list.forEach((word, i) => {
    const own = changed[i] ?? Boolean(changed[i - 1] && changed[i + 1]);
    if (joined.at(-1)?.[1] === own) joined.at(-1)[0] += word;
    else joined.push([word, own]);
  });
  return joined;
}
