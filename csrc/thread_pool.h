// Threads kept for many loops: parallel_for hands out indices one by one; the calling thread works too.
#pragma once
#include <dlfcn.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
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
class ThreadPool {
   public:
    ThreadPool(int threads, bool may_borrow) : size_(threads), shared_(may_borrow && threads > 1 && team_.size() == threads) {
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

    // Runs body(i) for every i in [0, count) in chunks of `chunk`; rethrows the first exception of any thread.
    void parallel_for(int64_t count, int64_t chunk, const std::function<void(int64_t)>& body) {
        std::lock_guard<std::mutex> one_job(job_mutex_);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            body_ = &body;
            count_ = count;
            chunk_ = chunk;
            next_ = 0;
            error_ = nullptr;
            running_ = static_cast<int>(workers_.size());
            ++generation_;
        }
        if (shared_)
            team_.run([](void* pool) { static_cast<ThreadPool*>(pool)->drain(); }, this, size_);
        else
            wake_.notify_all(), drain();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        if (error_) std::rethrow_exception(error_);
    }

   private:
    void drain() {
        try {
            for (int64_t begin; (begin = next_.fetch_add(chunk_)) < count_;)
                for (int64_t i = begin; i < begin + chunk_ && i < count_; ++i) (*body_)(i);
        } catch (...) {
            next_ = count_;
            std::lock_guard<std::mutex> lock(mutex_);
            if (!error_) error_ = std::current_exception();
        }
    }
    void work() {
        for (uint64_t seen = 0;;) {
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
                if (stop_) return;
                seen = generation_;
            }
            drain();
            std::lock_guard<std::mutex> lock(mutex_);
            if (--running_ == 0) done_.notify_one();
        }
    }

    int size_;
    TorchTeam team_;
    bool shared_;
    std::vector<std::thread> workers_;
    std::mutex mutex_, job_mutex_;
    std::condition_variable wake_, done_;
    const std::function<void(int64_t)>* body_ = nullptr;
    std::atomic<int64_t> next_{0};
    int64_t count_ = 0, chunk_ = 1;
    std::exception_ptr error_;
    int running_ = 0;
    uint64_t generation_ = 0;
    bool stop_ = false;
};

}  // namespace rag
