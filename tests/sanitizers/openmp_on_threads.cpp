// The few entry points of gcc's OpenMP runtime that the kernels call, on std::thread. ThreadSanitizer sees these barriers;
// those of libgomp, which it was not compiled with, it takes for races.
#include <atomic>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <vector>

namespace {

struct Loop {
  std::atomic<long> next;
  long end, step;
  Loop(long start, long end_, long step_) : next(start), end(end_), step(step_) {}
};

struct Team {
  explicit Team(unsigned size_) : size(size_) {}
  const unsigned size;
  std::mutex mutex;
  std::condition_variable all_here;
  unsigned waiting = 0, generation = 0;
  std::deque<Loop> loops;  // in the order in which every thread comes to them

  void barrier() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++waiting == size) {
      waiting = 0, ++generation;
      all_here.notify_all();
    } else {
      all_here.wait(lock, [&] { return generation != mine; });
    }
  }
};

thread_local Team* team;
thread_local size_t loops_begun;
thread_local Loop* loop;

bool take(long* from, long* to) {
  const long start = loop->next.fetch_add(loop->step);
  if (start >= loop->end) return false;
  *from = start, *to = start + loop->step < loop->end ? start + loop->step : loop->end;
  return true;
}

}  // namespace

extern "C" {

void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned) {
  Team all(threads ? threads : 1);
  const auto work = [&] { team = &all, loops_begun = 0, body(data); };
  std::vector<std::thread> others;
  for (unsigned i = 1; i < all.size; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* from, long* to) {
  {
    std::lock_guard<std::mutex> lock(team->mutex);
    if (team->loops.size() == loops_begun) team->loops.emplace_back(start, end, step * chunk);
    loop = &team->loops[loops_begun++];
  }
  return take(from, to);
}

bool GOMP_loop_nonmonotonic_dynamic_next(long* from, long* to) { return take(from, to); }
void GOMP_loop_end() { team->barrier(); }
void GOMP_loop_end_nowait() {}

}  // extern "C"
