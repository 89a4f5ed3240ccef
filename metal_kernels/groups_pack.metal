// One thread a byte of the payload. Neighbouring bytes are neighbouring tokens of one component, so reads of
// coefficients `[r, n]`, shifts and scales `[groups, n]` are neighbouring too.
uint byte = thread_position_in_grid.x;
uint tokens = sizes[1];

// The last run that starts at or before this byte.
uint run = 0, end = sizes[0];
while (end - run > 1) {
  uint middle = (run + end) / 2;
  if (uint(runs[middle * 6]) <= byte) {
    run = middle;
  } else {
    end = middle;
  }
}
uint offset = byte - runs[run * 6];
uint group = runs[run * 6 + 1], start = runs[run * 6 + 2], count = runs[run * 6 + 3];
uint size = runs[run * 6 + 4], bits = runs[run * 6 + 5];

uint side = count * tokens;
if (offset < 4 * side) {  // low and high bytes of shifts, then of scales
  uint plane = offset / side;
  uint at = group * tokens + offset % side;
  uint value = plane < 2 ? shifts[at] : scales[at];
  payload[byte] = uchar(value >> (8 * (plane & 1)));
} else {
  uint lanes = 8 / bits;
  uint code = (offset - 4 * side) * lanes;
  uint codes = size * side;
  uint packed = 0;
  for (uint lane = 0; lane < lanes && code + lane < codes; lane++) {
    uint component = (code + lane) / tokens, token = (code + lane) % tokens;
    uint at = (group + component / size) * tokens + token;
    float scale = float(as_type<half>(scales[at]));
    float value = coefficients[(start + component) * tokens + token] - float(as_type<half>(shifts[at]));
    value = value / (scale == 0.0f ? 1.0f : scale);
    uint rounded = bits == 8 ? to_e4m3(value) : uint(metal::clamp(metal::rint(value), 0.0f, float((1 << bits) - 1)));
    packed |= rounded << (lane * bits);
  }
  payload[byte] = uchar(packed);
}
