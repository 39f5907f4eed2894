// An accelerator that is simulated on a CPU, as torch's PrivateUse1 backend: for tests where there is no GPU.
//
// Device memory has addresses that the host cannot read, and a caching allocator after CUDA's. Streams are threads,
// copies are asynchronous where CUDA's are, events order streams. Operations are the CPU's, over the same bytes, once
// their stream has come to them; operands on two devices are refused as CUDA refuses them.
//
// Every access is checked against those before it by vector clocks: one that no event, stream or synchronisation orders
// after a conflicting one is a race, whether or not it went well this time. Fresh memory is filled with 0xFF.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_cpu_dispatch.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>

namespace {
using Clock = std::vector<uint64_t>;  // by stream
constexpr auto kDev = c10::DeviceType::PrivateUse1;
static const c10::Device DEV(kDev, 0);
double env(const char* name, double standard) {
  const char* v = getenv(name);
  return v && *v ? atof(v) : standard;
}
int64_t now_ns() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}
void merge(Clock& a, const Clock& b) {
  if (a.size() < b.size()) a.resize(b.size());
  for (size_t i = 0; i < b.size(); i++) a[i] = std::max(a[i], b[i]);
}

// ---- memory of the device: one file mapped twice, once without any access (its addresses are "device pointers")
struct Arena {
  size_t span = size_t(256) << 30;
  char *device = nullptr, *real = nullptr;
  int fd;
  Arena() {
    fd = memfd_create("simulated", MFD_CLOEXEC);
    TORCH_CHECK(fd >= 0 && ftruncate(fd, span) == 0, "memfd");
    device = (char*)mmap(nullptr, span, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    real = (char*)mmap(nullptr, span, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    TORCH_CHECK(device != MAP_FAILED && real != MAP_FAILED, "mmap");
  }
  bool has(const void* p) const { return p >= device && p < device + span; }
  bool has_real(const void* p) const { return p >= real && p < real + span; }
  void* to_real(const void* p) const { return has(p) ? real + ((const char*)p - device) : (void*)p; }
  void drop(char* p, size_t n) { fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, p - device, n); }
};
Arena& arena() {
  static Arena* a = new Arena;
  return *a;
}

// ---- pinned host memory
std::mutex pin_mutex;
std::map<char*, size_t> pinned;  // registered or allocated
bool is_pinned(const void* p, size_t n = 1) {
  std::lock_guard<std::mutex> l(pin_mutex);
  auto it = pinned.upper_bound((char*)p);
  if (it == pinned.begin()) return false;
  --it;
  return (const char*)p + n <= it->first + it->second;
}

// ---- sanitizer: which accesses are ordered
std::recursive_mutex san_mutex;
int sanitize = 1;  // 0 off, 1 record, 2 raise
std::vector<Clock> stream_clock;
Clock host_clock;
std::vector<std::string> races;
std::set<std::string> race_keys;
struct Access {
  int stream = -1;
  uint64_t at = 0;
  const char* what = "";
};
struct Node {
  char* end;
  Access write;
  std::vector<Access> reads;
};
std::map<char*, Node> accessed;
std::set<std::string> names;
const char* intern(const std::string& s) {
  return names.insert(s).first->c_str();
}
bool ordered(const Access& a, int s) {
  return a.stream < 0 || a.stream == s ||
         (stream_clock[s].size() > size_t(a.stream) && stream_clock[s][a.stream] >= a.at);
}
void launch(int s) {  // a new operation on stream s
  if (!sanitize) return;
  std::lock_guard<std::recursive_mutex> l(san_mutex);
  merge(stream_clock[s], host_clock);
  if (stream_clock[s].size() <= size_t(s)) stream_clock[s].resize(s + 1);
  stream_clock[s][s]++;
}
std::map<char*, Node>::iterator split(std::map<char*, Node>::iterator it, char* at) {
  Node right = it->second;
  it->second.end = at;
  return accessed.emplace(at, right).first;
}
void touch(int s, const void* begin, size_t n, bool write, const char* what) {
  if (!sanitize || !n) return;
  std::string found;
  {
    std::lock_guard<std::recursive_mutex> l(san_mutex);
    char* b = (char*)begin;
    char* e = b + n;
    Access me{s, stream_clock[s][s], what};
    auto it = accessed.upper_bound(b);
    if (it != accessed.begin()) {
      auto p = std::prev(it);
      if (p->second.end > b) it = p->first < b ? split(p, b) : p;
    }
    char* at = b;
    auto conflict = [&](const Access& a, const char* kind) {
      std::ostringstream o;
      o << (write ? "write" : "read") << " by " << what << " on stream " << s << " is not ordered after " << kind
        << " by " << a.what << " on stream " << a.stream;
      if (race_keys.insert(o.str()).second) {
        std::ostringstream full;
        full << o.str() << ": " << n << " bytes at " << begin << (arena().has(begin) ? " (device)" : " (host)");
        races.push_back(full.str());
        found = full.str();
      } else if (sanitize == 2)
        found = o.str();
    };
    while (at < e) {
      if (it == accessed.end() || it->first > at) {
        char* stop = it == accessed.end() ? e : std::min(e, it->first);
        Node fresh{stop, {}, {}};
        it = accessed.emplace(at, fresh).first;
      }
      if (it->second.end > e) {
        split(it, e);
        it = accessed.find(at);
      }
      Node& node = it->second;
      if (!ordered(node.write, s)) conflict(node.write, "the write");
      if (write) {
        for (auto& r : node.reads)
          if (!ordered(r, s)) conflict(r, "the read");
        node.write = me;
        node.reads.clear();
      } else {
        bool there = false;
        for (auto& r : node.reads)
          if (r.stream == s) {
            r = me;
            there = true;
          }
        if (!there) node.reads.push_back(me);
      }
      at = node.end;
      ++it;
    }
    // join what became equal, so that the map stays small
    if (write) {
      auto first = accessed.find(b);
      first->second.end = e;
      accessed.erase(std::next(first), accessed.lower_bound(e));
    }
  }
  if (!found.empty() && sanitize == 2) TORCH_CHECK(false, "simulated sanitizer: ", found);
}
void host_knows(const Clock& c) {
  if (sanitize) {
    std::lock_guard<std::recursive_mutex> l(san_mutex);
    merge(host_clock, c);
  }
}
Clock clock_of(int s) {
  std::lock_guard<std::recursive_mutex> l(san_mutex);
  return stream_clock[s];
}

// ---- streams and events
struct Moment {
  std::mutex m;
  std::condition_variable cv;
  bool done = false;
  int64_t ns = 0;
  Clock clock;
  void set() {
    std::lock_guard<std::mutex> l(m);
    ns = now_ns();
    done = true;
    cv.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> l(m);
    cv.wait(l, [&] { return done; });
  }
  bool over() {
    std::lock_guard<std::mutex> l(m);
    return done;
  }
};
struct Event {
  bool timing;
  std::shared_ptr<Moment> moment;
};
struct StreamQ {
  int id;
  std::mutex m;
  std::condition_variable cv, idle;
  std::deque<std::function<void()>> jobs;
  uint64_t put = 0, done = 0;
  bool started = false;
  explicit StreamQ(int id) : id(id) {}
  void add(std::function<void()> job) {
    std::lock_guard<std::mutex> l(m);
    if (!started) {
      started = true;
      std::thread([this] { run(); }).detach();
    }
    jobs.push_back(std::move(job));
    put++;
    cv.notify_one();
  }
  void run() {
    for (;;) {
      std::function<void()> job;
      {
        std::unique_lock<std::mutex> l(m);
        cv.wait(l, [&] { return !jobs.empty(); });
        job = std::move(jobs.front());
        jobs.pop_front();
      }
      job();
      job = nullptr;
      {
        std::lock_guard<std::mutex> l(m);
        done++;
        idle.notify_all();
      }
    }
  }
  void drain() {
    std::unique_lock<std::mutex> l(m);
    uint64_t until = put;
    idle.wait(l, [&] { return done >= until; });
  }
  bool empty() {
    std::lock_guard<std::mutex> l(m);
    return done == put;
  }
};
std::mutex streams_mutex;
std::vector<StreamQ*> streams;
thread_local int current = 0;
StreamQ& stream(int id) {
  std::lock_guard<std::mutex> l(streams_mutex);
  while (int(streams.size()) <= id) {
    streams.push_back(new StreamQ(streams.size()));
    std::lock_guard<std::recursive_mutex> k(san_mutex);
    stream_clock.emplace_back(streams.size());
  }
  return *streams[id];
}
int new_stream() {
  int id;
  {
    std::lock_guard<std::mutex> l(streams_mutex);
    id = std::max<int>(1, streams.size());
  }
  stream(id);
  return id;
}
void sync_stream(int s) {
  auto c = (stream(s), clock_of(s));
  stream(s).drain();
  host_knows(c);
}
void sync_device() {
  size_t n;
  {
    std::lock_guard<std::mutex> l(streams_mutex);
    n = streams.size();
  }
  for (size_t i = 0; i < n; i++) sync_stream(i);
}
std::shared_ptr<Moment> mark(int s) {
  auto moment = std::make_shared<Moment>();
  stream(s);
  launch(s);
  moment->clock = clock_of(s);
  stream(s).add([moment] { moment->set(); });
  return moment;
}
double copy_gbps = 0, copy_us = 0;

// ---- caching allocator, after CUDA's: segments of 2 MiB, 20 MiB or the request's size, split and joined, a pool per
// stream
struct Block {
  char* begin;
  size_t size;
  bool used;
  size_t asked;
  std::set<int> users;
};
struct Segment {
  char* begin;
  size_t size;
  int stream;
  bool small;
  std::map<char*, Block> blocks;
};
struct DeviceMemory final : c10::DeviceAllocator {
  std::recursive_mutex m;
  std::map<char*, Segment> segments;
  std::vector<std::pair<std::vector<std::shared_ptr<Moment>>, char*>> waiting;
  size_t total = size_t(env("SIMULATED_MEMORY", 4e9)), reserved = 0, peak_reserved = 0, allocated = 0,
         peak_allocated = 0;
  double fraction = 1.0;
  int64_t ooms = 0, retries = 0;
  int poison = env("SIMULATED_POISON", 1);
  Segment& segment_of(char* p) {
    auto it = segments.upper_bound(p);
    return std::prev(it)->second;
  }
  static void drop(void* p) {
    if (p) self().release((char*)p);
  }
  static DeviceMemory& self() {
    static DeviceMemory* a = new DeviceMemory;
    return *a;
  }
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? take(n) : nullptr;
    return {p, p, &drop, DEV};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t n) const override {
    stream(current).drain();
    launch(current);
    touch(current, from, n, false, "copy_data");
    touch(current, to, n, true, "copy_data");
    memcpy(arena().to_real(to), arena().to_real(from), n);
  }
  void collect() {
    for (size_t i = 0; i < waiting.size();) {
      bool over = true;
      for (auto& one : waiting[i].first) over &= one->over();
      if (!over) {
        i++;
        continue;
      }
      for (auto& one : waiting[i].first) host_knows(one->clock);
      char* p = waiting[i].second;
      waiting.erase(waiting.begin() + i);
      free_block(p);
    }
  }
  char* find(size_t n, bool small, int s) {
    Segment* best = nullptr;
    Block* block = nullptr;
    for (auto& [at, seg] : segments)
      if (seg.stream == s && seg.small == small)
        for (auto& [b, one] : seg.blocks)
          if (!one.used && one.size >= n && (!block || one.size < block->size)) {
            best = &seg;
            block = &one;
          }
    if (!block) return nullptr;
    size_t left = block->size - n;
    if (small ? left >= 512 : left > (1 << 20)) {
      block->size = n;
      best->blocks[block->begin + n] = Block{block->begin + n, left, false, 0, {}};
    }
    block->used = true;
    return block->begin;
  }
  bool grow(size_t n, bool small, int s) {
    size_t size = small ? (2 << 20) : n < (10 << 20) ? (20 << 20) : (n + (2 << 20) - 1) >> 21 << 21;
    if (reserved + size > size_t(total * fraction)) return false;
    char* at = arena().device + 4096 * 16;  // first fit
    for (auto& [b, seg] : segments) {
      if (size_t(b - at) >= size) break;
      at = seg.begin + seg.size;
    }
    TORCH_CHECK(at + size <= arena().device + arena().span, "arena");
    Segment seg{at, size, s, small, {}};
    seg.blocks[at] = Block{at, size, false, 0, {}};
    segments.emplace(at, std::move(seg));
    reserved += size;
    peak_reserved = std::max(peak_reserved, reserved);
    return true;
  }
  char* take(size_t asked) {
    std::lock_guard<std::recursive_mutex> l(m);
    collect();
    size_t n = (asked + 511) / 512 * 512;
    bool small = n <= (1 << 20);
    int s = current;
    char* p = find(n, small, s);
    if (!p && grow(n, small, s)) p = find(n, small, s);
    if (!p) {
      retries++;
      emptyCache({0, 0});
      if (grow(n, small, s)) p = find(n, small, s);
    }
    if (!p) {
      ooms++;
      TORCH_CHECK_WITH(OutOfMemoryError, false, "simulated out of memory. Tried to allocate ", asked, " bytes; ",
                       reserved, " reserved of ", size_t(total * fraction));
    }
    auto& block = segment_of(p).blocks[p];
    block.asked = asked;
    allocated += block.size;
    peak_allocated = std::max(peak_allocated, allocated);
    if (poison) {
      size_t size = block.size;
      auto fill = [p, size] { memset(arena().to_real(p), 0xFF, size); };
      stream(s);
      if (stream(s).empty())
        fill();
      else
        stream(s).add(fill);
    }
    return p;
  }
  void free_block(char* p) {
    auto& seg = segment_of(p);
    auto it = seg.blocks.find(p);
    it->second.used = false;
    it->second.users.clear();
    auto next = std::next(it);
    if (next != seg.blocks.end() && !next->second.used) {
      it->second.size += next->second.size;
      seg.blocks.erase(next);
    }
    if (it != seg.blocks.begin()) {
      auto prev = std::prev(it);
      if (!prev->second.used) {
        prev->second.size += it->second.size;
        seg.blocks.erase(it);
      }
    }
  }
  void release(char* p) {
    std::lock_guard<std::recursive_mutex> l(m);
    auto& block = segment_of(p).blocks.at(p);
    allocated -= block.size;
    if (block.users.empty()) return free_block(p);
    std::vector<std::shared_ptr<Moment>> moments;
    for (int s : block.users) moments.push_back(mark(s));
    waiting.emplace_back(std::move(moments), p);
  }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {
    std::lock_guard<std::recursive_mutex> l(m);
    sync_device();
    collect();  // as cudaFree does
    for (auto it = segments.begin(); it != segments.end();) {
      auto& seg = it->second;
      if (seg.blocks.size() == 1 && !seg.blocks.begin()->second.used) {
        arena().drop(seg.begin, seg.size);
        reserved -= seg.size;
        it = segments.erase(it);
      } else
        ++it;
    }
  }
  void recordStream(const c10::DataPtr& ptr, c10::Stream s) override {
    std::lock_guard<std::recursive_mutex> l(m);
    char* p = (char*)ptr.get_context();
    if (!p || !arena().has(p)) return;
    auto& seg = segment_of(p);
    if (seg.stream != int(s.id())) seg.blocks.at(p).users.insert(s.id());
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats stats;
    auto set = [](auto& stat, size_t now, size_t peak) {
      stat[0].current = now;
      stat[0].peak = peak;
    };
    set(stats.reserved_bytes, reserved, peak_reserved);
    set(stats.allocated_bytes, allocated, peak_allocated);
    set(stats.active_bytes, allocated, peak_allocated);
    stats.num_ooms = ooms;
    stats.num_alloc_retries = retries;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    std::lock_guard<std::recursive_mutex> l(m);
    peak_reserved = reserved;
    peak_allocated = allocated;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override { return {total - reserved, total}; }
};
struct PinnedMemory final : c10::Allocator {
  static void drop(void* p) {
    if (!p) return;
    sync_device();
    {
      std::lock_guard<std::mutex> l(pin_mutex);
      pinned.erase((char*)p);
    }
    free(p);
  }
  c10::DataPtr allocate(size_t n) override {
    void* p = nullptr;
    if (n) {
      TORCH_CHECK(posix_memalign(&p, 4096, n) == 0, "pinned memory");
      std::lock_guard<std::mutex> l(pin_mutex);
      pinned[(char*)p] = n;
    }
    return {p, p, &drop, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &drop; }
  void copy_data(void* to, const void* from, size_t n) const override { memcpy(to, from, n); }
};

// ---- generator: one of the CPU's behind another name
struct Generator final : c10::GeneratorImpl {
  at::Generator cpu;
  explicit Generator(at::Generator g)
      : GeneratorImpl(DEV, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(std::move(g)) {}
  void set_current_seed(uint64_t s) override { cpu.set_current_seed(s); }
  void set_offset(uint64_t o) override { cpu.set_offset(o); }
  uint64_t get_offset() const override { return 0; }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& s) override { cpu.unsafeGetGeneratorImpl()->set_state(s); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  GeneratorImpl* clone_impl() const override { return new Generator(cpu.clone()); }
};
at::Generator& default_generator() {
  static at::Generator* g = new at::Generator(c10::make_intrusive<Generator>(at::detail::createCPUGenerator()));
  return *g;
}

// ---- guard and hooks
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kDev; }
  c10::Device exchangeDevice(c10::Device) const override { return DEV; }
  c10::Device getDevice() const override { return DEV; }
  void setDevice(c10::Device d) const override { TORCH_CHECK(d.index() <= 0, "simulated has one device"); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  static c10::Stream as(int id) { return c10::Stream(c10::Stream::UNSAFE, DEV, id); }
  c10::Stream getStream(c10::Device) const override { return as(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return as(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return as(new_stream()); }
  c10::Stream getNewStream(c10::Device, int) const override { return as(new_stream()); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    int old = current;
    current = s.id();
    stream(current);
    return as(old);
  }
  void* getStreamNativeHandle(const c10::Stream s) const override { return (void*)s.id(); }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override { delete (Event*)e; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag flag) const override {
    if (!*e) *e = new Event{flag == c10::EventFlag::BACKEND_DEFAULT, nullptr};
    ((Event*)*e)->moment = mark(s.id());
  }
  void block(void* e, const c10::Stream& s) const override {
    if (!e || !((Event*)e)->moment) return;
    auto moment = ((Event*)e)->moment;
    auto& q = stream(s.id());
    if (sanitize) {
      std::lock_guard<std::recursive_mutex> l(san_mutex);
      merge(stream_clock[s.id()], moment->clock);
    }
    if (!moment->over()) q.add([moment] { moment->wait(); });
  }
  bool queryEvent(void* e) const override {
    if (!e || !((Event*)e)->moment) return true;
    bool over = ((Event*)e)->moment->over();
    if (over) host_knows(((Event*)e)->moment->clock);
    return over;
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  bool queryStream(const c10::Stream& s) const override {
    auto c = (stream(s.id()), clock_of(s.id()));
    bool e = stream(s.id()).empty();
    if (e) host_knows(c);
    return e;
  }
  void synchronizeStream(const c10::Stream& s) const override { sync_stream(s.id()); }
  void synchronizeEvent(void* e) const override {
    if (!e || !((Event*)e)->moment) return;
    auto mo = ((Event*)e)->moment;
    mo->wait();
    host_knows(mo->clock);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override { sync_device(); }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override {
    DeviceMemory::self().recordStream(p, s);
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    TORCH_CHECK(a && b && ((Event*)a)->timing && ((Event*)b)->timing,
                "both events must be recorded, with enable_timing");
    auto x = ((Event*)a)->moment, y = ((Event*)b)->moment;
    TORCH_CHECK(x->over() && y->over(), "simulated error: device not ready");  // as CUDA: neither may be pending
    return (y->ns - x->ns) / 1e6;
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* p) const override { return is_pinned(p); }
  c10::Allocator* getPinnedMemoryAllocator() const override {
    static PinnedMemory a;
    return &a;
  }
  at::Device getDeviceFromPtr(void* p) const override {
    TORCH_CHECK(arena().has(p), "not a device pointer");
    return DEV;
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::Generator(c10::make_intrusive<Generator>(at::detail::createCPUGenerator()));
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t n) const override {
    c10::DataPtr fresh = DeviceMemory::self().allocate(n);
    size_t both = std::min(n, storage.nbytes());
    if (both) DeviceMemory::self().copy_data(fresh.get(), storage.data(), both);
    storage.set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(n);
  }
};

// ---- a CPU tensor over the same bytes
struct Alias {
  at::Tensor original, cpu;
  void* data;
};
struct Aliases {
  std::vector<Alias> made;
  at::Tensor of(const at::Tensor& t) {
    for (auto& one : made)
      if (one.original.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return one.cpu;
    c10::Storage storage;
    void* data = nullptr;
    for (auto& one : made)
      if (one.original.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {
        storage = one.cpu.storage();
        data = one.data;
      }
    if (!storage) {
      data = arena().to_real(t.storage().data());
      storage = c10::Storage(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                             c10::DataPtr(data, c10::Device(c10::kCPU)), at::getCPUAllocator(), true);
    }
    at::Tensor cpu = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage),
                                                              c10::DispatchKeySet(c10::DispatchKey::CPU), t.dtype());
    auto* impl = cpu.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
    if (t.is_conj()) impl->_set_conj(true);
    if (t.is_neg()) impl->_set_neg(true);
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    made.push_back({t, cpu, data});
    return cpu;
  }
};
std::pair<char*, size_t> bytes(const at::Tensor& t) {
  if (!t.numel()) return {nullptr, 0};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  return {(char*)t.storage().data() + t.storage_offset() * t.itemsize(), (last + 1) * t.itemsize()};
}
void touch(const at::Tensor& t, bool write, const char* what) {
  auto [b, n] = bytes(t);
  touch(current, b, n, write, what);
}
bool ours(const at::Tensor& t) {
  return t.defined() && t.device().type() == kDev;
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout> layout, std::optional<at::Device>, std::optional<bool> pin) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided && !c10::pinned_memory_or_default(pin),
              "strided and not pinned");
  return at::detail::empty_strided_generic(size, stride, &DeviceMemory::self(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}
at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                 std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(c10::layout_or_default(layout) == at::kStrided && !c10::pinned_memory_or_default(pin),
              "strided and not pinned");
  return at::detail::empty_generic(size, &DeviceMemory::self(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
at::Tensor as_strided(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  return at::cpu::as_strided_symint(t, size, stride, offset);
}
at::Tensor view(const at::Tensor& t, c10::SymIntArrayRef size) {
  return at::native::view(t, C10_AS_INTARRAYREF_SLOW(size));
}
at::Tensor reshape_alias(const at::Tensor& t, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(t, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}
const at::Tensor& resize_(const at::Tensor& t, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, C10_AS_INTARRAYREF_SLOW(size), format);
}
at::Tensor& set_storage_offset(at::Tensor& t, at::Storage s, int64_t offset, c10::IntArrayRef size,
                               c10::IntArrayRef stride) {
  return at::cpu::set_(t, s, offset, size, stride);
}
at::Tensor& set_storage(at::Tensor& t, at::Storage s) {
  return at::native::set_(t, s);
}
at::Tensor& set_tensor(at::Tensor& t, const at::Tensor& s) {
  return at::native::set_tensor_(t, s);
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  if (!to.numel()) return to;
  bool to_device = ours(to) && !ours(from), to_host = ours(from) && !ours(to);
  const char* what = to_device ? "copy to device" : to_host ? "copy to host" : "copy";
  at::Tensor source = from.sizes() == to.sizes() ? from : from.expand(to.sizes());
  stream(current);
  launch(current);
  if (to_device || to_host) {
    bool plain = source.scalar_type() == to.scalar_type() && source.is_conj() == to.is_conj() &&
                 source.is_neg() == to.is_neg() && source.strides() == to.strides() &&
                 source.is_non_overlapping_and_dense() && to.is_non_overlapping_and_dense();
    auto [s, n] = bytes(source);
    auto [t, n2] = bytes(to);
    bool host_pinned = is_pinned(to_host ? t : s, to_host ? n2 : n);
    // The host's bytes count where a copy reads or writes them without the host waiting for it.
    touch(from, false, what);
    touch(to, true, what);
    if (plain) {
      void* dst = arena().to_real(t);
      const void* src = arena().to_real(s);
      size_t count = n;
      double pause = copy_us * 1e3 + (copy_gbps > 0 ? count / copy_gbps : 0);
      stream(current).add([=] {
        if (pause > 0) std::this_thread::sleep_for(std::chrono::nanoseconds(int64_t(pause)));
        memcpy(dst, src, count);
      });
      if (!(non_blocking && host_pinned)) sync_stream(current);
      return to;
    }
    sync_stream(current);
  } else {
    touch(from, false, what);
    touch(to, true, what);
    stream(current).drain();
  }
  Aliases a;
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor x = ours(source) ? a.of(source) : source, y = ours(to) ? a.of(to) : to;
  y.copy_(x);
  return to;
}
at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  const_cast<at::Tensor&>(to).resize_(from.sizes());
  const_cast<at::Tensor&>(to).copy_(from);
  return to;
}
at::Scalar local_scalar_dense(const at::Tensor& t) {
  stream(current);
  launch(current);
  touch(t, false, "item");
  sync_stream(current);
  Aliases a;
  return at::native::_local_scalar_dense_cpu(a.of(t));
}

// ---- every other operator: the CPU's, over the same bytes, when the stream has come there
std::set<std::string> cpu_may_mix{
    "aten::index",         "aten::index_put_",        "aten::_index_put_impl_", "aten::index_put",
    "aten::_unsafe_index", "aten::_unsafe_index_put", "aten::index.Tensor_out", "aten::set_data"};
std::mutex names_mutex;
std::mutex random_mutex;
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack, const c10::OperatorHandle& target, const char* what) {
  const auto& target_schema = target.schema();
  size_t n_args = target_schema.arguments().size();
  auto args = torch::jit::last(*stack, n_args);
  const size_t begin = stack->size() - n_args;
  Aliases aliases;
  std::vector<std::pair<at::Tensor, bool>> reads;
  std::vector<at::Tensor> written;
  bool any = false, given_generator = false;
  at::Tensor foreign;
  auto see = [&](const at::Tensor& t, bool write) -> at::Tensor {
    if (!t.defined()) return t;
    if (!ours(t)) {
      if (t.dim() > 0) foreign = t;
      return t;
    }
    any = true;
    reads.emplace_back(t, write);
    if (write) written.push_back(t);
    return aliases.of(t);
  };
  for (size_t i = 0; i < n_args; i++) {
    const auto& value = args[i];
    const auto& arg = target_schema.arguments()[i];
    bool write = arg.alias_info() && arg.alias_info()->isWrite();
    auto& slot = (*stack)[begin + i];
    if (value.isTensor())
      slot = see(value.toTensor(), write);
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(see(t, write));
      slot = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(see(*t, write)) : std::nullopt);
      slot = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == kDev) {
        slot = c10::Device(c10::kCPU);
        any = true;
      }
    } else if (value.isGenerator()) {
      auto g = value.toGenerator();
      TORCH_CHECK(g.device().type() == kDev, "Expected a 'simulated' device type for generator but found '",
                  g.device().type(), "'");
      slot = static_cast<Generator*>(g.unsafeGetGeneratorImpl())->cpu;
      given_generator = true;
    }
  }
  if (foreign.defined() && any && !reads.empty() && !cpu_may_mix.count(target_schema.name()))
    TORCH_CHECK(false,
                "Expected all tensors to be on the same device, but found at least two devices, simulated:0 and ",
                foreign.device(), "! (when checking arguments of ", what, ")");
  stream(current);
  launch(current);
  for (auto& [t, write] : reads) touch(t, write, what);
  stream(current).drain();
  {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    bool random = !given_generator && target.hasTag(at::Tag::nondeterministic_seeded);
    if (random) {
      std::lock_guard<std::mutex> l(random_mutex);
      auto cpu = at::detail::getDefaultCPUGenerator();
      auto& mine = static_cast<Generator*>(default_generator().unsafeGetGeneratorImpl())->cpu;
      auto host = cpu.get_state();
      cpu.set_state(mine.get_state());
      try {
        target.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
      } catch (...) {
        cpu.set_state(host);
        throw;
      }
      mine.set_state(cpu.get_state());
      cpu.set_state(host);
    } else
      target.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  for (auto& one : aliases.made) {  // what was resized has other memory
    bool moved = one.cpu.storage().data() != one.data,
         other = one.cpu.sizes() != one.original.sizes() || one.cpu.strides() != one.original.strides();
    if (!moved && !other) continue;
    if (moved) {
      one.original.resize_(one.cpu.sizes());
      one.original.unsafeGetTensorImpl()->set_sizes_and_strides(one.cpu.sizes(), one.cpu.strides(), 0);
      auto [b, n] = bytes(one.original);
      if (n) memcpy(arena().to_real(b), one.cpu.data_ptr(), n);
    } else
      one.original.unsafeGetTensorImpl()->set_sizes_and_strides(one.cpu.sizes(), one.cpu.strides(),
                                                                one.cpu.storage_offset());
  }
  std::vector<std::pair<c10::TensorImpl*, at::Tensor>> fresh;
  const c10::DispatchKeySet lazy({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});
  auto back = [&](const at::Tensor& t) -> at::Tensor {
    if (!t.defined() || !t.is_cpu()) return t;
    for (auto& one : aliases.made)
      if (one.cpu.unsafeGetTensorImpl() == t.unsafeGetTensorImpl()) return one.original;
    for (auto& [impl, made] : fresh)
      if (impl == t.unsafeGetTensorImpl()) return made;
    for (auto& one : aliases.made)
      if (one.cpu.storage().unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) {
        at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(
            c10::TensorImpl::VIEW, c10::Storage(one.original.storage()), one.original.key_set() - lazy, t.dtype());
        view.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), t.storage_offset());
        if (t.is_conj()) view.unsafeGetTensorImpl()->_set_conj(true);
        if (t.is_neg()) view.unsafeGetTensorImpl()->_set_neg(true);
        return view;
      }
    at::Tensor made = t.layout() != at::kStrided ? t
                                                 : empty_strided(t.sizes(), t.strides(), t.scalar_type(), std::nullopt,
                                                                 std::nullopt, std::nullopt);
    auto [b, n] = bytes(made);
    stream(current).drain();
    if (n) {
      touch(current, b, n, true, what);
      memcpy(arena().to_real(b), t.data_ptr(), n);
    }
    if (t.is_conj()) made.unsafeGetTensorImpl()->_set_conj(true);
    if (t.is_neg()) made.unsafeGetTensorImpl()->_set_neg(true);
    fresh.emplace_back(t.unsafeGetTensorImpl(), made);
    return made;
  };
  if (!any) return;
  size_t n_returns = target_schema.returns().size();
  bool scalar = false;
  for (size_t i = stack->size() - n_returns; i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor())
      value = back(value.toTensor());
    else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(back(t));
      value = list;
    } else if (!value.isNone())
      scalar = true;
  }
  if (scalar) host_knows(clock_of(current));  // the host has seen a value
}
void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const char* what;
  {
    std::lock_guard<std::mutex> l(names_mutex);
    what = intern(toString(op.operator_name()));
  }
  run(op, stack, op, what);
}
void convolution(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static auto target = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  run(op, stack, target, "convolution");
}
void convolution_backward(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static auto target = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  auto args = torch::jit::pop(*stack, 10);
  // grad_output, input, weight, stride, padding, dilation, transposed, output_padding, groups, output_mask
  auto weight = args[2].toTensor();
  int64_t out = args[6].toBool() ? weight.size(1) * args[8].toInt() : weight.size(0);
  for (int i = 0; i < 3; i++) stack->push_back(args[i]);
  stack->push_back(c10::IValue(std::vector<int64_t>{out}));
  for (int i = 3; i < 10; i++) stack->push_back(args[i]);
  run(op, stack, target, "convolution_backward");
}

// What accelerators have and the CPU has not: counts of integers, and cells of recurrent layers as one operation.
at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& least, const at::Scalar& most) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::histc", "");
  bool whole = c10::isIntegralType(self.scalar_type(), false);
  torch::jit::Stack stack{whole ? self.to(at::kFloat) : self, bins, least, most};
  run(op, &stack, op, "histc");
  auto counts = stack[0].toTensor();
  return whole ? counts.to(self.scalar_type()) : counts;
}
using Given = const std::optional<at::Tensor>&;
at::Tensor with_bias(const at::Tensor& gates, Given bias) {
  return bias && bias->defined() ? gates + *bias : gates;
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& input, const at::Tensor& hidden,
                                                         const at::Tensor& cx, Given input_bias, Given hidden_bias) {
  auto gates = (with_bias(input, input_bias) + with_bias(hidden, hidden_bias)).chunk(4, 1);
  auto in = gates[0].sigmoid(), forget = gates[1].sigmoid(), cell = gates[2].tanh(), out = gates[3].sigmoid();
  auto cy = forget * cx + in * cell;
  return {out * cy.tanh(), cy, at::cat({in, forget, cell, out}, 1)};
}
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell_backward(Given grad_hy, Given grad_cy, const at::Tensor& cx,
                                                                  const at::Tensor& cy, const at::Tensor& workspace,
                                                                  bool has_bias) {
  auto known = [&](Given grad) { return grad && grad->defined() ? *grad : at::zeros_like(cy); };
  auto gates = workspace.chunk(4, 1);
  auto in = gates[0], forget = gates[1], cell = gates[2], out = gates[3], squashed = cy.tanh(), ghy = known(grad_hy);
  auto gcy = ghy * out * (1 - squashed * squashed) + known(grad_cy);
  auto grad = at::cat({gcy * cell * in * (1 - in), gcy * cx * forget * (1 - forget), gcy * in * (1 - cell * cell),
                       ghy * squashed * out * (1 - out)},
                      1);
  return {grad, gcy * forget, has_bias ? grad.sum(0) : at::Tensor()};
}
std::tuple<at::Tensor, at::Tensor> gru_cell(const at::Tensor& input, const at::Tensor& hidden, const at::Tensor& hx,
                                            Given input_bias, Given hidden_bias) {
  auto in = with_bias(input, input_bias).chunk(3, 1), own = with_bias(hidden, hidden_bias).chunk(3, 1);
  auto reset = (in[0] + own[0]).sigmoid(), update = (in[1] + own[1]).sigmoid(), fresh = (in[2] + reset * own[2]).tanh();
  return {fresh + update * (hx - fresh), at::cat({reset, update, fresh, hx, own[2]}, 1)};
}
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> gru_cell_backward(const at::Tensor& grad_hy,
                                                                                         const at::Tensor& workspace,
                                                                                         bool has_bias) {
  auto saved = workspace.chunk(5, 1);
  auto reset = saved[0], update = saved[1], fresh = saved[2], hx = saved[3], own = saved[4];
  auto gfresh = grad_hy * (1 - update) * (1 - fresh * fresh);
  auto gupdate = grad_hy * (hx - fresh) * update * (1 - update), greset = gfresh * own * reset * (1 - reset);
  auto to_input = at::cat({greset, gupdate, gfresh}, 1), to_hidden = at::cat({greset, gupdate, gfresh * reset}, 1);
  auto sum = [&](const at::Tensor& grad) { return has_bias ? grad.sum(0) : at::Tensor(); };
  return {to_input, to_hidden, grad_hy * update, sum(to_input), sum(to_hidden)};
}
void record_stream(at::Tensor& t, c10::Stream s) {
  DeviceMemory::self().recordStream(t.storage().data_ptr(), s);
}
bool is_pinned_op(const at::Tensor& t, std::optional<at::Device>) {
  return t.is_cpu() && is_pinned(t.data_ptr());
}

bool compatible(const at::Tensor& a, const at::Tensor& b) {  // as among CPU and CUDA
  auto dense = [](const at::Tensor& t) { return t.layout() == at::kStrided && (t.is_cpu() || ours(t)); };
  return a.key_set() == b.key_set() || (dense(a) && dense(b));
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_storage_offset);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("record_stream", record_stream);
  m.impl("histc", histc);
  m.impl("_thnn_fused_lstm_cell", lstm_cell);
  m.impl("_thnn_fused_lstm_cell_backward_impl", lstm_cell_backward);
  m.impl("_thnn_fused_gru_cell", gru_cell);
  m.impl("_thnn_fused_gru_cell_backward", gru_cell_backward);
  m.impl("_has_compatible_shallow_copy_type", compatible);
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
  for (const char* name :
       {"native_layer_norm", "native_group_norm", "native_dropout", "_fused_sdp_choice", "_native_multi_head_attention",
        "_transformer_encoder_layer_fwd", "masked_fill_.Scalar", "embedding"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}
// A copy sees what is conjugated or negated as it is: what would be resolved before is resolved by a copy.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOW(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  using namespace at;
  using namespace at::autocast;
  AT_FORALL_LOWER_PRECISION_FP(LOW)
  AT_FORALL_FP32(FP32)
  AT_FORALL_PROMOTE(PROMOTE)
}
}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::register_privateuse1_backend("simulated");
  c10::SetAllocator(kDev, &DeviceMemory::self(), 1);
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  stream(0);
  copy_gbps = env("SIMULATED_GBPS", 0);
  copy_us = env("SIMULATED_COPY_US", 0);
  sanitize = int(env("SIMULATED_SANITIZE", 1));
  m.def("memory", [] {
    auto& a = DeviceMemory::self();
    std::lock_guard<std::recursive_mutex> l(a.m);
    return std::vector<size_t>{a.total,          a.reserved,     a.peak_reserved,  a.allocated,
                               a.peak_allocated, size_t(a.ooms), size_t(a.retries)};
  });
  m.def("set_fraction", [](double f) { DeviceMemory::self().fraction = f; });
  m.def("empty_cache", [] { DeviceMemory::self().emptyCache({0, 0}); }, py::call_guard<py::gil_scoped_release>());
  m.def("reset_peak", [] { DeviceMemory::self().resetPeakStats(0); });
  m.def("synchronize", [] { sync_device(); }, py::call_guard<py::gil_scoped_release>());
  m.def("register_host", [](size_t p, size_t n) {
    std::lock_guard<std::mutex> l(pin_mutex);
    TORCH_CHECK(!pinned.count((char*)p), "already registered");
    pinned[(char*)p] = n;
  });
  m.def(
      "unregister_host",
      [](size_t p) {
        sync_device();
        std::lock_guard<std::mutex> l(pin_mutex);
        TORCH_CHECK(pinned.erase((char*)p), "not registered");
      },
      py::call_guard<py::gil_scoped_release>());
  m.def("host_view", [](at::Tensor t) {  // a device tensor over pinned host memory
    TORCH_CHECK(is_pinned(t.data_ptr(), t.nbytes()), "host_view needs pinned memory");
    auto* kept = new at::Tensor(t);
    c10::Storage s(c10::Storage::use_byte_size_t(), t.nbytes(),
                   c10::DataPtr(
                       t.data_ptr(), kept,
                       [](void* p) {
                         py::gil_scoped_acquire g;
                         delete (at::Tensor*)p;
                       },
                       DEV),
                   nullptr, false);
    at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(
        std::move(s), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), t.dtype());
    made.unsafeGetTensorImpl()->set_sizes_and_strides(t.sizes(), t.strides(), 0);
    return made;
  });
  m.def("default_generator", [] { return default_generator(); });
  m.def("races", [] {
    std::lock_guard<std::recursive_mutex> l(san_mutex);
    return races;
  });
  m.def("set_link", [](double gbps, double us) {
    copy_gbps = gbps;
    copy_us = us;
  });
}
