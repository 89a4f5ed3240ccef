// One thread an element: dim along x, token along y, (layer, batch, head) along z. Neighbouring threads read and
// write neighbouring elements on both sides; the partner's line is in cache.
uint d = thread_position_in_grid.x;
uint t = thread_position_in_grid.y;
uint line = thread_position_in_grid.z;  // (layer * batches + batch) * heads + head
uint layers = sizes[0], batches = sizes[1], heads = sizes[2], tokens = sizes[3], dim = sizes[4];
uint head = line % heads, batch = line / heads % batches, layer = line / (heads * batches);

size_t in_layers = (size_t(line) * tokens + t) * dim;
size_t in_rows = (((size_t(batch) * tokens + t) * layers + layer) * heads + head) * dim;
size_t from = TO_ROWS ? in_layers : in_rows;
size_t to = TO_ROWS ? in_rows : in_layers;

uint kind = table[layer];
uint angle = (kind * tokens + t) * dim + d;
float own = float(x[from + d]) * cosines[angle];
float other = float(x[from + partners[kind * dim + d]]) * sines[angle];
turned[to + d] = T(own + other);
