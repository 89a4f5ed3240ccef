// One thread a coefficient: token along x, component along y. Neighbouring threads read neighbouring codes, shifts
// and scales and write neighbouring coefficients `[r, n]`.
uint token = thread_position_in_grid.x, component = thread_position_in_grid.y;
uint tokens = sizes[1];

// The last run that starts at or before this component.
uint run = 0, end = sizes[0];
while (end - run > 1) {
  uint middle = (run + end) / 2;
  if (uint(runs[middle * 6 + 2]) <= component) {
    run = middle;
  } else {
    end = middle;
  }
}
uint first = runs[run * 6], start = runs[run * 6 + 2], count = runs[run * 6 + 3];
uint size = runs[run * 6 + 4], bits = runs[run * 6 + 5];
uint side = count * tokens;

float value = 0.0f;
if (component >= start && component < start + count * size) {
  uint inside = component - start;
  uint at = first + inside / size * tokens + token;
  float shift = float(as_type<half>(ushort(payload[at] | (payload[at + side] << 8))));
  float scale = float(as_type<half>(ushort(payload[at + 2 * side] | (payload[at + 3 * side] << 8))));
  uint lanes = 8 / bits;
  uint code = inside * tokens + token;
  uint packed = payload[first + 4 * side + code / lanes] >> (code % lanes * bits);
  float step = bits == 8 ? from_e4m3(uchar(packed)) : float(packed & ((1 << bits) - 1));
  value = step * scale + shift;
}
coefficients[component * tokens + token] = value;
