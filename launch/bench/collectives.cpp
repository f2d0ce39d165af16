// drrl-bench collectives: time and bandwidth of collectives over message sizes, over the groups
// that training uses, by the conventions of nccl-tests (github.com/NVIDIA/nccl-tests,
// doc/PERFORMANCE.md): the message is the larger of input and output of one process, algbw =
// message / time, busbw = algbw x bus_factor (distributed/collectives/traffic.h), 1 GB = 1e9 bytes,
// float32.

#include <algorithm>
#include <chrono>
#include <iostream>
#include <thread>

#include <gflags/gflags.h>

#include "core/error.h"
#include "core/io/file_io.h"
#include "distributed/topology/mesh.h"
#include "launch/bench/bench.h"
#include "launch/bench/flags.h"
#include "launch/bench/scaling_model.h"
#include "launch/options/flags.h"
#include "launch/options/options.h"
#include "launch/runtime/console.h"
#include "launch/runtime/program.h"

DEFINE_string(operations, "all_reduce,all_gather,reduce_scatter,broadcast,all_to_all",
              "collectives: operations to measure, a comma list");
DEFINE_string(bytes, "1024,16384,262144,4194304",
              "collectives: message sizes, a comma list, rounded down to whole floats for each "
              "process [bytes]");
DEFINE_string(group, "world",
              "collectives: processes that communicate: world, or all groups of --tp, --cp or --dp "
              "at the same time: tp, cp, dp or data");

namespace drrl::bench {
namespace {

using Json = nlohmann::ordered_json;

constexpr int64_t kPeriod = 251;  // prime, so that no shift by a buffer's size goes unnoticed

/// One period of what a member contributes: whole numbers, so that any sum over members is exact in
/// float32.
std::vector<float> contribution(int64_t member) {
  std::vector<float> values;
  for (int64_t i = 0; i < kPeriod; ++i) {
    values.push_back(static_cast<float>((7 * i + 31 * member) % kPeriod));
  }
  return values;
}

std::vector<float> sum_of_contributions(int64_t members) {
  std::vector<float> sum(kPeriod, 0.0F);
  for (int64_t member = 0; member < members; ++member) {
    const auto values = contribution(member);
    std::transform(sum.begin(), sum.end(), values.begin(), sum.begin(), std::plus<>());
  }
  return sum;
}

/// Elements [begin, begin + count) of the endless repetition of `values`.
at::Tensor repeated(const std::vector<float>& values, int64_t begin, int64_t count) {
  return at::tensor(values)
      .repeat({count / kPeriod + 2})
      .narrow(0, begin % kPeriod, count)
      .contiguous();
}

/// One collective on one message.
struct Message {
  at::Tensor input, result, expected;
  Work call;              ///< from `input` to `result`
  bool in_place = false;  ///< `call` overwrites `result`, which `input` goes into first

  void prepare() const {
    if (in_place) {
      result.copy_(input);
    } else {
      result.fill_(-1);
    }
  }
};

/// `elements` is a multiple of the group's size.
Message make_message(const std::string& operation, const Group& group, int64_t elements,
                     at::Device device) {
  const int64_t share = elements / group.size();
  const auto own = contribution(group.rank());
  const auto shares_of_all = [&](int64_t begin) {
    std::vector<at::Tensor> parts;
    for (int64_t member = 0; member < group.size(); ++member) {
      parts.push_back(repeated(contribution(member), begin, share));
    }
    return at::cat(parts);
  };
  Message m;
  if (operation == "all_reduce") {
    m = {repeated(own, 0, elements),
         at::empty({elements}),
         repeated(sum_of_contributions(group.size()), 0, elements),
         {},
         true};
  } else if (operation == "broadcast") {
    m = {repeated(own, 0, elements),
         at::empty({elements}),
         repeated(contribution(0), 0, elements),
         {},
         true};
  } else if (operation == "all_gather") {
    m = {repeated(own, 0, share), at::empty({elements}), shares_of_all(0), {}};
  } else if (operation == "reduce_scatter") {
    m = {repeated(own, 0, elements),
         at::empty({share}),
         repeated(sum_of_contributions(group.size()), group.rank() * share, share),
         {}};
  } else {
    check(ErrorKind::kUsage, operation == "all_to_all", "--operations=", FLAGS_operations, ": '",
          operation,
          "' is none of all_reduce, all_gather, reduce_scatter, broadcast and all_to_all");
    m = {
        repeated(own, 0, elements), at::empty({elements}), shares_of_all(group.rank() * share), {}};
  }
  for (at::Tensor* tensor : {&m.input, &m.result, &m.expected}) {
    *tensor = tensor->to(device);
  }
  at::Tensor input = m.input, result = m.result;
  if (operation == "all_reduce") {
    m.call = [=, &group]() mutable { group.all_reduce(result); };
  } else if (operation == "broadcast") {
    m.call = [=, &group]() mutable { group.broadcast(result, 0); };
  } else if (operation == "all_gather") {
    m.call = [=, &group]() mutable { group.all_gather(result, input); };
  } else if (operation == "reduce_scatter") {
    m.call = [=, &group]() mutable { group.reduce_scatter(result, input); };
  } else {
    const std::vector<int64_t> shares(static_cast<size_t>(group.size()), share);
    m.call = [=, &group]() mutable {
      group.all_to_all_async(result, shares, input, shares).wait();
    };
  }
  return m;
}

/// A row of results. Collective over `world`, of which `group` is a part.
Json measure(const std::string& operation, const Group& group, const Group& world, int64_t bytes,
             at::Device device) {
  constexpr int64_t kFloatBytes = 4;
  const int64_t elements = std::max<int64_t>(1, bytes / kFloatBytes / group.size()) * group.size();
  const Message message = make_message(operation, group, elements, device);
  std::vector<double> us;
  for (int64_t round = -1; round < FLAGS_repeats; ++round) {  // the first one is not counted
    message.prepare();
    synchronize(device);
    world.barrier();
    const auto start = std::chrono::steady_clock::now();
    message.call();
    synchronize(device);
    const std::chrono::duration<double, std::micro> spent = std::chrono::steady_clock::now() -
                                                            start;
    check_exact(c10::str(group.describe(), ": ", operation, " of ", elements, " floats"),
                message.result, message.expected);
    if (round >= 0) {
      us.push_back(spent.count());
    }
  }
  at::Tensor slowest = at::tensor(us, at::kDouble)
                           .to(world.message_device());  // of all processes, for each repeat
  world.all_reduce(slowest, ReduceOp::kMax);
  slowest = slowest.cpu();
  const double time = median(
      {slowest.data_ptr<double>(), slowest.data_ptr<double>() + slowest.numel()});
  const int64_t size = elements * kFloatBytes;
  const double algbw = static_cast<double>(size) / time / 1e3;
  return {{"operation", operation}, {"members", group.size()},
          {"bytes", size},          {"count", elements},
          {"type", "float32"},      {"time_us", time},
          {"algbw_gb_s", algbw},    {"busbw_gb_s", algbw * bus_factor(operation, group.size())}};
}

const Group& group_flag(const Mesh& mesh) {
  const std::vector<std::pair<std::string, const Group*>> groups = {{"world", &mesh.world()},
                                                                    {"tp", &mesh.tp()},
                                                                    {"cp", &mesh.cp()},
                                                                    {"dp", &mesh.dp()},
                                                                    {"data", &mesh.data()}};
  const auto found = std::find_if(groups.begin(), groups.end(),
                                  [](const auto& g) { return g.first == FLAGS_group; });
  check(ErrorKind::kUsage, found != groups.end(),
        "--group must be world, tp, cp, dp or data, got '", FLAGS_group, "'");
  check(ErrorKind::kUsage, found->second->size() > 1, "--group=", FLAGS_group,
        " is of one process, which sends nothing: start several, with mpirun for example, and set "
        "--tp, --cp or --dp");
  return *found->second;
}

}  // namespace

ExitCode collectives(const Environment& environment) {
  const MeshShape shape = mesh_flags(environment);
  const at::Device device = device_flag(environment);
  const auto sizes = parse_list("bytes", FLAGS_bytes, 1);
  const Mesh mesh = create_mesh(environment, shape, device);
  guarded(environment, [&] {
    const Group& group = group_flag(mesh);
    const bool leader = environment.world_rank == 0;
    if (leader) {
      print_banner(std::cout, "drrl-bench collectives",
                   {{"group", c10::str(FLAGS_group, ", ", group.size(), " processes of ",
                                       environment.world_size, " (", name(environment.launcher),
                                       "), ", environment.local_size, " on this node")},
                    {"versions", version_line()}});
    }
    Json rows = Json::array();
    for (const std::string& operation : split(FLAGS_operations, ',')) {
      for (const int64_t bytes : sizes) {
        rows.push_back(measure(operation, group, mesh.world(), bytes, device));
      }
    }
    if (leader) {
      std::vector<std::vector<std::string>> table = {
          {"operation", "bytes", "floats", "time us", "algbw GB/s", "busbw GB/s"}};
      for (const Json& row : rows) {
        table.push_back({row["operation"], row["bytes"].dump(), row["count"].dump(),
                         format("%.1f", row["time_us"].get<double>()),
                         format("%.3f", row["algbw_gb_s"].get<double>()),
                         format("%.3f", row["busbw_gb_s"].get<double>())});
      }
      std::cout << "\ntime: median of " << FLAGS_repeats
                << " of the slowest process; results verified; algbw: bytes / time; busbw: algbw x "
                   "2 (n - 1) / n "
                << "(all_reduce), (n - 1) / n, 1 (broadcast), n = " << group.size() << "\n";
      print_table(std::cout, table);
      if (!FLAGS_json.empty()) {
        Json json = provenance("collectives");
        json["launcher"] = name(environment.launcher);
        json["world_size"] = environment.world_size;
        json["processes_per_node"] = environment.local_size;
        json["cores_per_node"] = std::thread::hardware_concurrency();
        json["group"] = FLAGS_group;
        json["repeats"] = FLAGS_repeats;
        json["results"] = rows;
        write_measured(FLAGS_json, json);
      }
      if (!FLAGS_csv.empty()) {
        write_text(FLAGS_csv, to_csv(rows));
      }
    }
    mesh.world().barrier();
  });
  return ExitCode::kSuccess;
}

}  // namespace drrl::bench
