// Documents: samples become rows in one pass over each.
//
// Bytes moved per position of a row: 3 of the sample (id and mask), 24 written. A sample is handled in runs
// of text between two images, whose loops the compiler vectorises.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>

#include "../common/prefetch.h"
#include "documents.h"

namespace megamm {
namespace {

constexpr int64_t kIgnoreIndex = -100;
constexpr int64_t kGrainPositions = 1 << 15;  // below this a thread costs more than it saves
constexpr int64_t kGrainBytes = 1 << 18;

// So many of `count` pieces as make up `grain` of all the `work`.
int64_t pieces(int64_t count, int64_t work, int64_t grain) {
  return std::max<int64_t>(1, count * grain / std::max<int64_t>(work, 1));
}

// Calls run(tokens) with the pointer as its type.
template <typename Run>
auto with_type(const Stretches& samples, const Run& run) {
  if (samples.wide) return run(static_cast<const int32_t*>(samples.tokens));
  return run(static_cast<const uint16_t*>(samples.tokens));
}

// `id` as an id of the array; `possible`: an array of this type can hold it.
template <typename T>
struct Id {
  explicit Id(int64_t id)
      : value(static_cast<T>(id)),
        possible(id >= std::numeric_limits<T>::min() && id <= std::numeric_limits<T>::max()) {}
  T value;
  bool possible;
};

template <typename T>
int64_t count_of(const T* begin, const T* end, Id<T> id) {
  if (!id.possible) return 0;
  int64_t found = 0;
  while (begin < end) {  // in blocks that 16 bits can count, which vectorises better
    const T* stop = begin + std::min<int64_t>(end - begin, 1 << 14);
    T block = 0;
    for (; begin < stop; ++begin) block += static_cast<T>(*begin == id.value);
    found += block;
  }
  return found;
}

template <typename T>
const T* next_of(const T* begin, const T* end, Id<T> id) {
  if (!id.possible) return end;
  constexpr int64_t block = 32;
  for (; end - begin >= block; begin += block) {
    bool any = false;
    for (int64_t i = 0; i < block; ++i) any |= begin[i] == id.value;
    if (any) break;
  }
  return std::find(begin, end, id.value);
}

int64_t count_learnt(const uint8_t* learnt, int64_t count) {
  int64_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += learnt[i] != 0;
  return found;
}

// The parts of a sample in order, up to `limit` positions: text(first, count, position) for runs of text,
// image(index, count, position) for the positions of an image. Returns the positions that there were.
template <typename T, typename Text, typename Image>
int64_t walk(const T* tokens, int64_t size, Id<T> id, int64_t per_image, int64_t limit, const Text& text,
             const Image& image) {
  int64_t index = 0, position = 0;
  while (index < size && position < limit) {
    const int64_t stop = index + std::min(size - index, limit - position);
    const int64_t run = next_of(tokens + index, tokens + stop, id) - (tokens + index);
    if (run > 0) text(index, run, position);
    index += run, position += run;
    if (index < stop) {
      const int64_t count = std::min(per_image, limit - position);
      image(index, count, position);
      ++index, position += count;
    }
  }
  return position;
}

template <typename T>
void sizes_of(const DocumentSizes& args, const T* all, int64_t number) {
  const Id<T> id(args.image.id);
  const int64_t start = args.samples.starts[number], size = args.samples.ends[number] - start;
  const int64_t per_image = args.image.positions, limit = args.max_positions[number];
  const T* tokens = all + start;
  const uint8_t* learnt = args.samples.learnt + start;
  const int64_t placeholders = count_of(tokens, tokens + size, id);
  const int64_t whole = size + (per_image - 1) * placeholders;
  int64_t kept = whole, images = placeholders;
  if (kept > limit || images > args.max_images[number]) {
    kept = std::min(kept, limit), images = 0;
    walk(
        tokens, size, id, per_image, kept, [](int64_t, int64_t, int64_t) {},
        [&](int64_t, int64_t count, int64_t position) {
          if (position >= kept) return;  // behind one that was dropped
          if (count == per_image && images < args.max_images[number]) {
            ++images;
          } else {
            kept = position;
          }
        });
    kept = std::max<int64_t>(kept, 1);
  }
  int64_t labels = 0;
  if (placeholders == 0) {
    labels = count_learnt(learnt + 1, kept - 1);
  } else {
    walk(
        tokens, size, id, per_image, kept,
        [&](int64_t index, int64_t count, int64_t) { labels += count_learnt(learnt + index, count); },
        [&](int64_t index, int64_t count, int64_t) { labels += learnt[index] != 0 ? count : 0; });
    labels -= learnt[0] != 0;  // nothing comes before the first position
  }
  args.positions[number] = kept;
  args.images[number] = images;
  args.placeholders[number] = placeholders;
  args.num_labels[number] = labels;
  args.truncated[number] = kept < whole || images < placeholders;
}

void count_up(int64_t* out, int64_t count, int64_t from) {
  for (int64_t i = 0; i < count; ++i) out[i] = from + i;
}

template <typename T>
bool fill_document(const FillRows& args, const T* all, int64_t number) {
  const Id<T> id(args.image.id);
  const int64_t start = args.samples.starts[number], size = args.samples.ends[number] - start;
  const int64_t base = args.rows[number] * args.length + args.offsets[number];
  const int64_t kept = args.positions[number];
  const T* tokens = all + start;
  const uint8_t* learnt = args.samples.learnt + start;
  int64_t *ids = args.input_ids + base, *labels = args.labels + base;
  count_up(args.position_ids + base, kept, 0);
  const int64_t found = walk(
      tokens, size, id, args.image.positions, kept,
      [&](int64_t index, int64_t count, int64_t position) {
        const T* from = tokens + index;
        const uint8_t* flag = learnt + index;
        for (int64_t i = 0; i < count; ++i) ids[position + i] = from[i];
        // what is at a position is the label of the one before
        for (int64_t i = position == 0; i < count; ++i) {
          labels[position - 1 + i] = flag[i] != 0 ? static_cast<int64_t>(from[i]) : kIgnoreIndex;
        }
      },
      [&](int64_t index, int64_t count, int64_t position) {
        std::fill_n(ids + position, count, args.image.id);
        const int64_t skipped = position == 0, label = learnt[index] != 0 ? args.image.id : kIgnoreIndex;
        std::fill_n(labels + position - 1 + skipped, count - skipped, label);
      });
  labels[kept - 1] = kIgnoreIndex;
  // a sample that lost everything, its first image too
  if (kept == 1 && args.images[number] == 0 && id.possible && tokens[0] == id.value) ids[0] = args.pad_id;
  return found == kept;
}

void fill_padding(const FillRows& args, int64_t row) {
  const int64_t end = args.row_ends[row], base = row * args.length + end, count = args.length - end;
  std::fill_n(args.input_ids + base, count, args.pad_id);
  std::fill_n(args.labels + base, count, kIgnoreIndex);
  count_up(args.position_ids + base, count, args.resume[row]);
}

}  // namespace

void document_sizes_cpu(const DocumentSizes& args) {
  const int64_t count = args.samples.count;
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) work += args.samples.ends[i] - args.samples.starts[i];
  with_type(args.samples, [&](const auto* tokens) {
    at::parallel_for(0, count, pieces(count, work, 4 * kGrainPositions), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i + 1 < end) {
          const int64_t next = args.samples.starts[i + 1], size = args.samples.ends[i + 1] - next;
          prefetch(tokens + next, size * static_cast<int64_t>(sizeof(*tokens)));
          prefetch(args.samples.learnt + next, size);
        }
        sizes_of(args, tokens, i);
      }
    });
  });
}

bool fill_rows_cpu(const FillRows& args) {
  std::atomic<bool> whole{true};
  const int64_t count = args.samples.count, jobs = count + args.num_rows;
  const int64_t grain = pieces(jobs, args.num_rows * args.length, kGrainPositions);
  with_type(args.samples, [&](const auto* tokens) {
    at::parallel_for(0, jobs, grain, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; ++job) {
        if (job >= count) {
          fill_padding(args, job - count);
        } else if (!fill_document(args, tokens, job)) {
          whole = false;
        }
      }
    });
  });
  return whole;
}

void gather_documents_cpu(const GatherDocuments& args) {
  const int64_t grain = pieces(args.count, args.total * args.item, kGrainBytes);
  at::parallel_for(0, args.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kPrefetchAhead < end) {
        const int64_t start = args.starts[i + kPrefetchAhead];
        prefetch(args.flat + start * args.item, (args.ends[i + kPrefetchAhead] - start) * args.item);
      }
      const int64_t length = args.ends[i] - args.starts[i];
      args.lengths[i] = length;
      std::memcpy(args.out + args.offsets[i] * args.item, args.flat + args.starts[i] * args.item,
                  static_cast<size_t>(length * args.item));
    }
  });
}

}  // namespace megamm
