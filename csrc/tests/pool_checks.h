// The threads run every index once, job after job, also after they slept, with errors, and for several callers.
#pragma once
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "thread_pool.h"

namespace rag::test {

inline void errors_of_threads_reach_the_caller(ThreadPool& pool) {
    try {
        pool.parallel_for(100, 3, [](int64_t i) {
            if (i == 50) throw std::runtime_error("expected");
        });
        CHECK(!"thrown");
    } catch (const std::runtime_error&) {
    }
}

// The jobs lie on the caller's stack and differ: a thread that comes late to one would be noticed.
inline void every_index_once(ThreadPool& pool, int64_t jobs) {
    for (int64_t job = 0; job < jobs; ++job) {
        const int64_t count = job % 11 * (job % 7), chunk = 1 + job % 4;
        std::vector<int64_t> times(count, 0);  // not atomic: what threads write is the caller's afterwards
        pool.parallel_for(count, chunk, [&](int64_t i) { times[i] += i + job; });
        for (int64_t i = 0; i < count; ++i) CHECK(times[i] == i + job);
    }
}

// Loops that begin before their caller joins in, in any order with others, finished or brought to an end by those.
inline void loops_begun_early(ThreadPool& pool) {
    for (int64_t job = 0; job < 300; ++job) {
        const int64_t count = job % 9;
        std::vector<int64_t> times(count, 0);
        const auto body = [&](int64_t i) { times[i] += i + job; };
        const uint64_t number = pool.start(count, body);
        if (job % 5 == 1) every_index_once(pool, 3);
        if (job % 5 == 2) std::this_thread::sleep_for(std::chrono::microseconds(10 * (job % 40)));
        if (job % 5 == 3) {
            std::atomic<int64_t> sum{0};
            const auto other = [&](int64_t i) { sum += i; };
            const uint64_t later = pool.start(4, other);
            pool.finish(number);
            pool.finish(later);
            CHECK(sum == 6);
        }
        pool.finish(number);
        pool.finish(number);
        for (int64_t i = 0; i < count; ++i) CHECK(times[i] == i + job);
    }
}

inline void check_pool(int threads) {
    ThreadPool pool(threads, false);
    every_index_once(pool, 3000);
    loops_begun_early(pool);
    for (int i = 0; i < 20; ++i) {
        std::this_thread::sleep_for(std::chrono::microseconds(1700 + 40 * i));  // about as long as threads look for work
        every_index_once(pool, 13);
        errors_of_threads_reach_the_caller(pool);
    }
    // A chunk that takes longer than the caller waits in a loop.
    std::atomic<int> slept{0};
    pool.parallel_for(threads, 1, [&](int64_t) { std::this_thread::sleep_for(std::chrono::milliseconds(5)), ++slept; });
    CHECK(slept == threads);
    std::thread other([&] { every_index_once(pool, 500); });
    every_index_once(pool, 500);
    other.join();
    for (int i = 0; i < 30; ++i) ThreadPool(threads, false).parallel_for(i % 3, 1, [&](int64_t) { ++slept; });
    CHECK(slept == threads + 30);
}

}  // namespace rag::test
