// One thread decodes one lane: symbols lane, lane + lanes, ... Neighbouring threads write neighbouring symbols.
// Whatever the words are, reads stay inside: past the end of all words a lane reads the last one again.
uint lane = thread_position_in_grid.x;
uint size = params[0], chunk = params[1], lanes = params[2], last = params[3];
uint part = lane / chunk, place = lane % chunk;              // which chunk the symbol is in, and where there
uint part_step = lanes / chunk, place_step = lanes % chunk;  // so that the loop needs no division by chunk
uint state = states[lane], next = starts[lane];
for (uint index = lane; index < size; index += lanes) {
  uint entry = table[(uint(which[part]) << 12) | (state & 4095)];
  symbols[index] = uchar(entry >> 24);
  state = (state >> 12) * (((entry >> 12) & 4095) + 1) + (entry & 4095);
  if (state < (1u << 16)) {
    state = (state << 16) | uint(words[metal::min(next, last)]);
    next += 1;
  }
  place += place_step;
  part += part_step + (place < chunk ? 0 : 1);
  place -= place < chunk ? 0 : chunk;
}
final_states[lane] = state;
ends[lane] = next;
