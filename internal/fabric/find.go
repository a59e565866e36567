package fabric

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"

	"violin/internal/coloring"
	"violin/internal/cut"
	"violin/internal/priority"
	"violin/internal/record"
)

// wiring is what is written down of what is plugged into a switch.
type wiring struct {
	Run    uint16
	Switch coloring.Switch
	Taps   map[string]uint32
}

// colors is what is written down of what changes in a cut.
type colors struct {
	Nodes   []nodeColor
	Counted map[uint16][]cut.Epoch
}

type nodeColor struct {
	Node  coloring.NodeKey
	Color coloring.Color
}

func (s *Switch) writeWiring() error {
	if s.cfg.Dial == nil {
		return nil
	}
	return record.Write(filepath.Join(s.cfg.Dir, "wiring.json"), wiring{Run: s.run, Switch: s.sw, Taps: s.taps})
}

func (s *Switch) writeColors(st coloring.State) error {
	if s.cfg.Dial == nil {
		return nil
	}
	c := colors{Counted: st.Counted}
	for k, v := range st.Nodes {
		c.Nodes = append(c.Nodes, nodeColor{k, v})
	}
	return record.Write(filepath.Join(s.cfg.Dir, "colors.json"), c)
}

// Find finds the switch that an agent before this one has started in a directory. It
// forwards by the entries that it has. The result is not nil: after an error, whatever
// there is is to be closed. Otherwise [Switch.Open] comes next.
func Find(ctx context.Context, cfg Config) (s *Switch, err error) {
	s = newSwitch(cfg)
	defer func() {
		if err != nil {
			err = fmt.Errorf("find Open vSwitch on %s: %w", cfg.Host, err)
		}
	}()
	if s.nl, err = cfg.Netlink(); err != nil {
		return s, err
	}
	if s.daemons, err = findDaemons(cfg); err != nil {
		return s, err
	}
	var w wiring
	if err := record.Read(filepath.Join(cfg.Dir, "wiring.json"), &w); err != nil {
		return s, err
	}
	s.run, s.sw = w.Run, w.Switch
	maps.Copy(s.taps, w.Taps)
	var c colors
	if err := record.Read(filepath.Join(cfg.Dir, "colors.json"), &c); err != nil && len(s.taps) > 0 {
		return s, err
	}
	for _, n := range c.Nodes {
		s.state.Nodes[n.Node] = n.Color
	}
	maps.Copy(s.state.Counted, c.Counted)
	s.urgency = &priority.Shared{PID: s.daemons.pid(), Log: s.log}
	if err := priority.Calm(s.daemons.pid()); err != nil {
		s.log.Debug("the switch's priority is not as it should be", "err", err)
	}
	if s.db, err = openDatabase(ctx, s.daemons.socket(), s.log); err != nil {
		return s, err
	}
	s.control, err = dialControl(ctx, s.daemons.control())
	return s, err
}

// Tap is the number of the port that a device is plugged into; 0 for none.
func (s *Switch) Tap(name string) uint32 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.taps[name]
}

// Peers are the other hosts that there are tunnels to.
func (s *Switch) Peers() []coloring.Peer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sw.Peers)
}

// Color is that of a node, as the switch has it or is to have it.
func (s *Switch) Color(k coloring.NodeKey) coloring.Color {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state.Nodes[k]
}

// Open opens the session with a switch that was found, and brings the switch to what is
// written down: ports that nobody knows of are removed, then entries repaired. What the
// switch has handed over since the last agent died comes with it.
func (s *Switch) Open(ctx context.Context) error {
	if err := s.removeUnknown(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	flows, err := s.flows(s.state)
	s.installed = flows
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if err := s.connect(ctx); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.repair(s.conn.Load())
}

// removeUnknown removes the ports that were made and not written down any more.
func (s *Switch) removeUnknown(ctx context.Context) error {
	rows, err := s.db.query(ctx, "Port", nil, "name")
	if err != nil {
		return err
	}
	known := []string{integration, physical, s.cfg.UnderlayDevice}
	for tap := range s.taps {
		known = append(known, tap)
	}
	for _, p := range s.sw.Peers {
		known = append(known, tunnelName(p.ID))
	}
	var errs []error
	for _, row := range rows {
		if name, ok := row["name"].(string); ok && !slices.Contains(known, name) {
			errs = append(errs, s.db.removePort(ctx, integration, name))
		}
	}
	return errors.Join(errs...)
}
