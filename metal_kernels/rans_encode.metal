// One thread codes one lane, symbols lane, lane + lanes, ..., from the last to the first: rANS is last in, first out.
// Neighbouring threads touch neighbouring symbols. Each symbol says whether it pushed a word and which: the words are
// compacted outside, where the order across lanes is known.
uint lane = thread_position_in_grid.x;
uint size = params[0], chunk = params[1], lanes = params[2];
uint left = lane < size ? (size - 1 - lane) / lanes + 1 : 0;
uint index = lane + (left - 1) * lanes;
uint part = index / chunk, place = index % chunk;            // which chunk the symbol is in, and where there
uint part_step = lanes / chunk, place_step = lanes % chunk;  // so that the loop needs no division by chunk
uint state = 1u << 16;
bool known = true;
for (; left > 0; --left) {
  uint entry = table[uint(which[part]) * 256 + uint(symbols[index])];
  uint start = entry >> 16, frequency = metal::max(entry & 0xffff, 1u);
  known = known && (entry & 0xffff) > 0;
  bool full = (state >> 20) >= frequency;
  low[index] = ushort(state & 0xffff);
  pushed[index] = uchar(full);
  state = full ? state >> 16 : state;
  state += state / frequency * (4096 - frequency) + start;
  index -= lanes;  // after the last symbol these three wrap around, unused
  part -= part_step + (place < place_step ? 1 : 0);
  place += (place < place_step ? chunk : 0) - place_step;
}
states[lane] = known ? state : 0;  // no lane ends below 2^16: 0 tells of a symbol that its table lacks
