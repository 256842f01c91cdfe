// Between two steps of decoding, without main memory: what each row reads in the next.
//
// advance: after each step.
//   words [11, rows] int64: starts and ends of what a row sees (0, 1), the same inside CAT layers (2, 3), of the place of its
//     input there (4, 5); its position (6), that inside CAT layers (7); its newest id (8); the key and the number of its next
//     uniform (9, 10). how [rows]: what it is sampled by. log [most, rows], step [rows] int64.
//   ids [rows]: the token chosen. Everything that counts rows or tokens grows by 1, but for starts (0, 2); newest = id,
//     log[step] = id, step += 1, uniform = number `number` of the stream of `key`, as random.rs has it (Philox4x32-10).
//   block [rows, chunk] int64, or null: the ids of the chunk that is not full; the new one comes to its place there. A row at
//     position p >= header is that of its block's token p - header.
// fill_chunks: before the step that fills a chunk in every row. `words` count as if the chunk went on: its last token would be
// the next row. In its place comes a new slot, and header - 1 rows after it.
//   seen [2, header rows]: starts and ends of what these rows see. groups [rows, 4]: the first of a text's, how many, the start
//     and the end of what the first sees. numbers [rows]: of the chunk in its text.
//   words (1, 6) become what `advance` turns into those of the first row after them.
//
// Launch: for_each(rows). Steps past `most` are not noted.
#include "rows.cuh"

// As in sample.cu.
struct How {
  double temperature, top_p, min_p, uniform;
  i64 top_k;
};

// Number i of the uniforms in [0, 1) of a key, on a grid of 2^-53: two of the four words of block i / 2.
DEVICE double uniform_at(u64 key, u64 i) {
  u32 k0 = (u32)key, k1 = (u32)(key >> 32);
  u32 c0 = (u32)(i / 2), c1 = (u32)(i / 2 >> 32), c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const u64 a = (u64)c0 * 0xD2511F53u, b = (u64)c2 * 0xCD9E8D57u;
    const u32 n0 = (u32)(b >> 32) ^ c1 ^ k0, n2 = (u32)(a >> 32) ^ c3 ^ k1;
    c0 = n0, c1 = (u32)b, c2 = n2, c3 = (u32)a;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const u64 word = i % 2 ? (u64)c2 | (u64)c3 << 32 : (u64)c0 | (u64)c1 << 32;
  return (double)(word >> 11) * (1.0 / 9007199254740992.0);
}

KERNEL advance(i64 *words, How *how, i64 *step, i64 *log, const i64 *ids, i64 rows, i64 most, i64 *block, i64 chunk,
               i64 header) {
  begin_early();
  for (i64 r = thread_index(); r < rows; r += thread_count()) {
    const i64 id = ids[r], at = step[r], number = words[10 * rows + r] + 1;
#pragma unroll
    for (int list = 1; list < 8; list++)
      if (list != 2) words[list * rows + r] += 1;
    const i64 place = words[6 * rows + r] - header;
    if (block && place >= 0 && place < chunk) block[r * chunk + place] = id;
    words[8 * rows + r] = id;
    words[10 * rows + r] = number;
    how[r].uniform = uniform_at((u64)words[9 * rows + r], (u64)number);
    if (at < most) log[at * rows + r] = id;
    step[r] = at + 1;
  }
}

KERNEL fill_chunks(i64 *words, i64 *seen, i64 *groups, i64 *numbers, i64 rows, i64 chunk, i64 header) {
  begin_early();
  for (i64 r = thread_index(); r < rows; r += thread_count()) {
    const i64 start = words[r], end = words[rows + r], slot_end = end - chunk + 2 - header;
    for (i64 j = 0; j < header; j++) {
      seen[r * header + j] = start;
      seen[(rows + r) * header + j] = slot_end + j;
    }
    i64 *const group = groups + 4 * r;
    group[0] = r * header, group[1] = header, group[2] = start, group[3] = slot_end;
    numbers[r] = slot_end - start - 2;
    words[rows + r] = end - chunk + 1;
    words[6 * rows + r] -= chunk;
  }
}
