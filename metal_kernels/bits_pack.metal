// One thread per output word: it rounds every value that touches its 32 bits, so a 3-bit value across two words is
// rounded twice and no two threads write one word. Neighbouring threads own neighbouring words of a row. The grid is
// exactly words x tokens x rows, so no thread is left over.
uint3 place = thread_position_in_grid;
uint dim = x_shape[2];
size_t row = size_t(place.z) * x_shape[1] + place.y;
size_t tiles = (size_t(place.z) * shift_shape[1] + place.y / TOKENS) * shift_shape[2];
int bit = int(place.x) * 32;
int end = metal::min(int(dim), (bit + 32 + BITS - 1) / BITS);
uint word = 0;
for (int d = bit / BITS; d < end; d++) {
  size_t tile = tiles + d / DIMS;
  float step = float(scale[tile]);
  float steps = (float(x[row * dim + d]) - float(shift[tile])) / (step == 0.0f ? 1.0f : step);
  uint code = steps > 0.0f ? uint(metal::min(metal::rint(steps), float((1 << BITS) - 1))) : 0u;  // NaN becomes 0
  int left = d * BITS - bit;
  word |= left < 0 ? code >> -left : code << left;
}
words[row * threads_per_grid.x + place.x] = word;
