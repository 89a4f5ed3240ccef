// One thread per value, dims along x: writes are coalesced, and the threads of one word read it together. The grid is
// exactly dims x tokens x rows, so no thread is left over.
uint3 place = thread_position_in_grid;
size_t row = size_t(place.z) * words_shape[1] + place.y;
size_t tile = (size_t(place.z) * shift_shape[1] + place.y / TOKENS) * shift_shape[2] + place.x / DIMS;
float code = float(read_bits(words + row * words_shape[2], place.x, BITS));
x[row * threads_per_grid.x + place.x] = T(float(scale[tile]) * code + float(shift[tile]));
