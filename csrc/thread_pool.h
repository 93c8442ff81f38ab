// Threads kept for many loops: parallel_for hands out chunks of indices; the calling thread works too.
#pragma once
#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace rag {

// The OpenMP team of torch, where torch is there. Its idle threads spin for a while and would take the cores from others.
class TorchTeam {
   public:
    TorchTeam() {
        void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        if (!torch) return;
        run_ = reinterpret_cast<Run>(dlsym(torch, "GOMP_parallel"));
        size_ = reinterpret_cast<Size>(dlsym(torch, "omp_get_max_threads"));
    }
    // Threads that a loop of the calling thread gets; 0 without a team.
    int size() const { return run_ && size_ ? size_() : 0; }
    void run(void (*body)(void*), void* data, int threads) const { run_(body, data, threads, 0); }

   private:
    using Run = void (*)(void (*)(void*), void*, unsigned, unsigned);
    using Size = int (*)();
    Run run_ = nullptr;
    Size size_ = nullptr;
};

// Threads of its own, or torch's team where it may borrow that and it has as many: then torch and this never compete for
// cores.
//
// Threads of its own, and the caller at a job's end, look for work in a loop for kSpin before they sleep: to wake a thread
// takes as long as a short job. Only where every thread has a core, though. A job is handed out without a lock: a thread
// owns a chunk once it has lowered `unclaimed_`, and reads what the job is only then, while it cannot end. So one that
// comes late finds nothing to do, and nobody waits for it.
class ThreadPool {
   public:
    ThreadPool(int threads, bool may_borrow)
        : size_(threads),
          shared_(may_borrow && threads > 1 && team_.size() == threads),
          spins_(threads <= cores()) {
        for (int i = 1; i < threads && !shared_; ++i) workers_.emplace_back([this] { work(); });
    }
    ~ThreadPool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        wake_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return size_; }

    // What a thread that looks for something in a loop does between two looks.
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Runs body(i) for every i in [0, count) in chunks of `chunk`; rethrows the first exception of any thread, after which
    // other chunks may not have run.
    template <class Body>
    void parallel_for(int64_t count, int64_t chunk, const Body& body) {
        std::lock_guard<std::mutex> lock(turn_mutex_);
        end_job();
        begin_job(count, chunk, body);
        end_job();
    }
    // A loop that the pool's own threads begin, one body(i) at a time, and in which the caller joins them with `finish` of
    // the number returned; body must outlive that. Whoever wants a loop of his own before brings this one to its end first.
    template <class Body>
    uint64_t start(int64_t count, const Body& body) {
        std::lock_guard<std::mutex> lock(turn_mutex_);
        end_job();
        begin_job(count, 1, body);
        return ++started_;
    }
    void finish(uint64_t number) {
        std::lock_guard<std::mutex> lock(turn_mutex_);
        if (number == started_) end_job();
    }

   private:
    using Call = void (*)(const void*, int64_t);
    static constexpr std::chrono::milliseconds kSpin{2};

    // That this process may use.
    static int cores() {
#ifdef __linux__
        cpu_set_t set;
        if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
        return static_cast<int>(std::thread::hardware_concurrency());
    }
    // Is `ready` so, at once or after a while?
    template <class Ready>
    bool spin_until(const Ready& ready) const {
        if (!spins_) return ready();
        const auto end = std::chrono::steady_clock::now() + kSpin;
        do
            for (int i = 0; i < 32; ++i, pause())
                if (ready()) return true;
        while (std::chrono::steady_clock::now() < end);
        return false;
    }

    template <class Body>
    void begin_job(int64_t count, int64_t chunk, const Body& body) {
        call_ = [](const void* to, int64_t i) { (*static_cast<const Body*>(to))(i); };
        body_ = &body;
        count_ = count, chunk_ = chunk, chunks_ = (count + chunk - 1) / chunk;
        error_ = nullptr, failed_ = false;
        undone_ = chunks_;
        unclaimed_ = chunks_;
        going_on_ = true;
        if (!shared_ && count > 0) call_workers();
    }
    void end_job() {
        if (!going_on_) return;
        going_on_ = false;
        if (shared_ && count_ > 0)
            team_.run([](void* pool) { static_cast<ThreadPool*>(pool)->drain(); }, this, size_);
        else
            drain();
        const auto done = [this] { return undone_ == 0; };
        if (!spin_until(done)) {
            std::unique_lock<std::mutex> lock(mutex_);
            caller_sleeps_ = true;
            done_.wait(lock, done);
            caller_sleeps_ = false;
        }
        if (error_) std::rethrow_exception(error_);
    }
    // A worker counts itself among the sleeping before it looks for a job the last time: either it sees this one, or it is
    // seen here, and the lock waits until it sleeps. `drain` and the caller likewise.
    void call_workers() {
        ++jobs_;
        if (!asleep_) return;
        { std::lock_guard<std::mutex> lock(mutex_); }
        wake_.notify_all();
    }
    void drain() {
        int64_t own = 0;
        for (int64_t left = unclaimed_; left > 0;) {
            if (!unclaimed_.compare_exchange_weak(left, left - 1)) continue;
            run_chunk(chunks_ - left);
            ++own;
            left = unclaimed_;
        }
        if (!own || undone_.fetch_sub(own) != own || !caller_sleeps_) return;
        { std::lock_guard<std::mutex> lock(mutex_); }
        done_.notify_one();
    }
    void run_chunk(int64_t number) {
        if (failed_) return;
        const int64_t begin = number * chunk_, end = std::min(begin + chunk_, count_);
        try {
            for (int64_t i = begin; i < end; ++i) call_(body_, i);
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!failed_) error_ = std::current_exception();
            failed_ = true;
        }
    }
    void work() {
        for (uint64_t seen = 0;;) {
            const auto called = [&] { return stop_ || jobs_ != seen; };
            if (!spin_until(called)) {
                std::unique_lock<std::mutex> lock(mutex_);
                ++asleep_;
                wake_.wait(lock, called);
                --asleep_;
            }
            if (stop_) return;
            seen = jobs_;
            drain();
        }
    }

    int size_;
    TorchTeam team_;
    bool shared_, spins_;
    std::vector<std::thread> workers_;
    std::mutex mutex_, turn_mutex_;
    std::condition_variable wake_, done_;
    std::atomic<bool> stop_{false}, caller_sleeps_{false}, failed_{false};
    std::atomic<int> asleep_{0};
    // The job, and how many there were with a number.
    bool going_on_ = false;
    uint64_t started_ = 0;
    Call call_ = nullptr;
    const void* body_ = nullptr;
    int64_t count_ = 0, chunk_ = 1, chunks_ = 0;
    std::exception_ptr error_;
    // On lines of their own: many threads look at each.
    alignas(64) std::atomic<uint64_t> jobs_{0};
    alignas(64) std::atomic<int64_t> unclaimed_{0};  // chunks
    alignas(64) std::atomic<int64_t> undone_{0};
};

}  // namespace rag
