package fabric

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/go-logr/logr"
	"github.com/ovn-kubernetes/libovsdb/client"
	"github.com/ovn-kubernetes/libovsdb/model"
	"github.com/ovn-kubernetes/libovsdb/ovsdb"
)

// database is the switch's configuration, over OVSDB (RFC 7047; the columns are
// those of ovs-vswitchd.conf.db(5)).
type database struct {
	client client.Client
}

// The tables of the schema that are used here. No row is cached.
type (
	openVSwitchRow struct {
		UUID string `ovsdb:"_uuid"`
	}
)

func openDatabase(ctx context.Context, socket string, log *slog.Logger) (*database, error) {
	m, err := model.NewClientDBModel("Open_vSwitch", map[string]model.Model{"Open_vSwitch": &openVSwitchRow{}})
	if err != nil {
		return nil, fmt.Errorf("ovsdb: %w", err)
	}
	logger := logr.FromSlogHandler(log.With("part", "ovsdb").Handler()).V(4)
	c, err := client.NewOVSDBClient(m, client.WithEndpoint("unix:"+socket), client.WithLogger(&logger))
	if err != nil {
		return nil, fmt.Errorf("ovsdb: %w", err)
	}
	if err := c.Connect(ctx); err != nil {
		return nil, fmt.Errorf("ovsdb: connect to %s: %w", socket, err)
	}
	db := &database{client: c}
	rows, err := db.query(ctx, "Open_vSwitch", nil, "_uuid")
	if err == nil && len(rows) == 0 {
		_, err = db.transact(ctx, ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Open_vSwitch", Row: ovsdb.Row{"next_cfg": 0}})
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return db, nil
}

func (db *database) close() { db.client.Close() }

func (db *database) transact(ctx context.Context, ops ...ovsdb.Operation) ([]ovsdb.OperationResult, error) {
	results, err := db.client.Transact(ctx, ops...)
	if err != nil {
		return nil, fmt.Errorf("ovsdb: %w", err)
	}
	if failed, err := ovsdb.CheckOperationResults(results, ops); err != nil {
		return nil, fmt.Errorf("ovsdb: %w: %v", err, failed)
	}
	return results, nil
}

func (db *database) query(ctx context.Context, table string, where []ovsdb.Condition, columns ...string) ([]ovsdb.Row, error) {
	if where == nil {
		where = everyRow()
	}
	rs, err := db.transact(ctx, ovsdb.Operation{Op: ovsdb.OperationSelect, Table: table, Where: where, Columns: columns})
	if err != nil {
		return nil, err
	}
	return rs[0].Rows, nil
}

// everyRow matches all rows: an empty list would do, but the library leaves it
// out of the message, which the server refuses.
func everyRow() []ovsdb.Condition {
	return []ovsdb.Condition{ovsdb.NewCondition("_uuid", ovsdb.ConditionNotEqual, ovsdb.UUID{GoUUID: "00000000-0000-0000-0000-000000000000"})}
}

func named(name string) []ovsdb.Condition {
	return []ovsdb.Condition{ovsdb.NewCondition("name", ovsdb.ConditionEqual, name)}
}

func uuidSet(id string) ovsdb.OvsSet {
	return ovsdb.OvsSet{GoSet: []any{ovsdb.UUID{GoUUID: id}}}
}

func stringMap(m map[string]string) ovsdb.OvsMap {
	om := ovsdb.OvsMap{GoMap: map[any]any{}}
	for k, v := range m {
		om.GoMap[k] = v
	}
	return om
}

// configure runs operations, and returns when ovs-vswitchd has obeyed them
// (next_cfg and cur_cfg, as ovs-vsctl does).
func (db *database) configure(ctx context.Context, ops ...ovsdb.Operation) error {
	ops = append(ops, ovsdb.Operation{
		Op: ovsdb.OperationMutate, Table: "Open_vSwitch", Where: everyRow(),
		Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("next_cfg", ovsdb.MutateOperationAdd, 1)},
	}, ovsdb.Operation{
		Op: ovsdb.OperationSelect, Table: "Open_vSwitch", Where: everyRow(), Columns: []string{"next_cfg"},
	})
	rs, err := db.transact(ctx, ops...)
	if err != nil {
		return err
	}
	wanted, ok := rs[len(ops)-1].Rows[0]["next_cfg"].(float64)
	if !ok {
		return errors.New("ovsdb: next_cfg is no number")
	}
	for {
		rows, err := db.query(ctx, "Open_vSwitch", nil, "cur_cfg")
		if err != nil {
			return err
		}
		if cur, ok := rows[0]["cur_cfg"].(float64); ok && cur >= wanted {
			return nil
		}
		select {
		case <-time.After(3 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("ovs-vswitchd has not obeyed its configuration: %w", ctx.Err())
		}
	}
}

func (db *database) addBridge(ctx context.Context, name, datapath string, address net.HardwareAddr) error {
	row := ovsdb.Row{
		"name": name, "datapath_type": datapath, "ports": uuidSet("port"),
	}
	other := map[string]string{"disable-in-band": "true", "controller-queue-size": "512"}
	if address != nil {
		other["hwaddr"] = address.String()
	} else {
		row["protocols"] = "OpenFlow15"
		row["fail_mode"] = "secure"
	}
	row["other_config"] = stringMap(other)
	err := db.configure(ctx,
		ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Interface", UUIDName: "interface", Row: ovsdb.Row{"name": name, "type": "internal"}},
		ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Port", UUIDName: "port", Row: ovsdb.Row{"name": name, "interfaces": uuidSet("interface")}},
		ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Bridge", UUIDName: "bridge", Row: row},
		ovsdb.Operation{
			Op: ovsdb.OperationMutate, Table: "Open_vSwitch", Where: everyRow(),
			Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("bridges", ovsdb.MutateOperationInsert, uuidSet("bridge"))},
		},
	)
	if err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	return nil
}

// addPort adds a port of one interface and returns its OpenFlow number.
func (db *database) addPort(ctx context.Context, bridge, name, kind string, options map[string]string) (uint32, error) {
	err := db.configure(ctx,
		ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Interface", UUIDName: "interface", Row: ovsdb.Row{
			"name": name, "type": kind, "options": stringMap(options),
		}},
		ovsdb.Operation{Op: ovsdb.OperationInsert, Table: "Port", UUIDName: "port", Row: ovsdb.Row{"name": name, "interfaces": uuidSet("interface")}},
		ovsdb.Operation{
			Op: ovsdb.OperationMutate, Table: "Bridge", Where: named(bridge),
			Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("ports", ovsdb.MutateOperationInsert, uuidSet("port"))},
		},
	)
	if err != nil {
		return 0, fmt.Errorf("add port %s to %s: %w", name, bridge, err)
	}
	rows, err := db.query(ctx, "Interface", named(name), "ofport", "error")
	if err != nil {
		return 0, fmt.Errorf("add port %s to %s: %w", name, bridge, err)
	}
	if len(rows) == 1 {
		if number, ok := rows[0]["ofport"].(float64); ok && number > 0 {
			return uint32(number), nil
		}
	}
	return 0, fmt.Errorf("add port %s to %s: ovs-vswitchd could not: %v", name, bridge, rows)
}

func (db *database) removePort(ctx context.Context, bridge, name string) error {
	rows, err := db.query(ctx, "Port", named(name), "_uuid")
	if err != nil || len(rows) == 0 {
		return err
	}
	id, ok := rows[0]["_uuid"].(ovsdb.UUID)
	if !ok {
		return fmt.Errorf("remove port %s: ovsdb: its id is a %T", name, rows[0]["_uuid"])
	}
	if err := db.configure(ctx, ovsdb.Operation{
		Op: ovsdb.OperationMutate, Table: "Bridge", Where: named(bridge),
		Mutations: []ovsdb.Mutation{*ovsdb.NewMutation("ports", ovsdb.MutateOperationDelete, uuidSet(id.GoUUID))},
	}); err != nil {
		return fmt.Errorf("remove port %s from %s: %w", name, bridge, err)
	}
	return nil
}
